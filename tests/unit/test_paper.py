"""Published numbers: their arithmetic, what may stand beside them, and the verdict."""

from decimal import Decimal
from pathlib import Path

import pytest

from mgvq.analysis.tables.paper import Claim, Number, judge, mismatch, read_works
from mgvq.errors import UserError


def number(value: str, **changes: object) -> Number:
    what = {
        "unit": "%",
        "metric": "accuracy",
        "method": "theirs",
        "model": "InternVL2-26B",
        "benchmark": "Tiny VQA",
        "bits": Decimal(2),
    }
    return Number(value=Decimal(value), where="abstract", evidence="A", **{**what, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("printed", "first", "second", "verdict"),
    [
        ("4.4", "71.4", "67.0", "holds"),
        ("4.5", "71.4", "67.0", "within rounding"),  # 71.44 - 66.96 = 4.48
        ("4.6", "71.4", "67.0", "does not hold: off by 0.2"),
        ("4.9", "71.4", "67.0", "does not hold: off by 0.5"),
        ("0", "5.92", "5.92", "agree"),
        ("0", "6.29", "5.92", "differ by 0.37"),
    ],
)
def test_a_claim_is_held_against_its_own_numbers(printed: str, first: str, second: str, verdict: str) -> None:
    terms = number(first), number(second)
    claim = Claim(says="gain", value=Decimal(printed), unit="points", minus=terms, where="abstract", evidence="A")
    assert claim.verdict == verdict


@pytest.mark.parametrize(
    ("mean", "low", "high", "verdict"),
    [
        (4.44, 4.0, 5.0, "reproduced"),
        (4.46, 4.0, 5.0, "inside the interval"),
        (4.9, 4.4, 5.4, "inside the interval"),
        (4.9, 4.5, 5.3, "not reproduced"),
    ],
)
def test_verdicts_on_comparable_numbers(mean: float, low: float, high: float, verdict: str) -> None:
    assert judge(Decimal("4.4"), mean, low, high) == verdict


def test_only_what_was_measured_alike_is_comparable() -> None:
    same = {"model": "internvl2_26b", "benchmark": "tiny_vqa", "bits": 2.004, "measure": "accuracy"}
    assert mismatch(number("71.4"), **same) == []
    assert mismatch(number("71.4", benchmark=None), **same) == ["benchmark not named"]
    other = mismatch(number("71.4"), model="tiny_internvl", benchmark="mmmu", bits=2.25, measure="loss")
    assert other == ["other model (tiny_internvl)", "other benchmark (mmmu)", "loss, not accuracy", "2.25 bits, not 2"]


GOOD = """
work: w
source: s
numbers:
  a: {value: 67.0, unit: "%", metric: accuracy, method: m, model: M, benchmark: null, bits: 2, where: abstract, evidence: A}
claims:
  - {says: nothing, value: 0, unit: points, minus: [a, a], where: abstract, evidence: A}
"""


def test_digits_stay_as_printed(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(GOOD)
    (work,) = read_works(tmp_path)
    assert str(work.numbers["a"].value) == "67.0"
    assert work.claims[0].verdict == "agree"


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("minus: [a, a]", "minus: [a, b]", "'b'"),
        ("minus: [a, a]", "minus: [a]", "w.yaml"),
        ("evidence: A}", "evidence: X}", "evidence must be one of A, R"),
        ("unit: points, ", "", "unit"),
    ],
)
def test_a_bad_file_is_named(old: str, new: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(GOOD.replace(old, new))
    with pytest.raises(UserError, match=named):
        read_works(tmp_path)
