"""What the paper and its peers have published, `results/paper/*.yaml`: read, checked by arithmetic, and judged against ours.

A published number is typed once, there, with its source; everything else here is computed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mgvq.errors import UserError

EVIDENCE = {
    "A": "abstract page",
    "R": "text of the paper, without its display formulas",
    "P": "paper",
    "D": "README or documentation of its repository",
    "I": "a thread of its issues",
}
_Entry = TypeVar("_Entry")


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number as it is printed. Raises UserError for evidence of an unknown kind."""

    value: Decimal
    """The number, with the digits that are printed."""
    unit: str
    """The unit of the number."""
    metric: str
    """What it measures."""
    method: str
    """The method that it was measured for."""
    model: str
    """The model that was quantised."""
    benchmark: str | None
    """The questions that were asked; None where they are not named."""
    bits: Decimal | None
    """Bits a weight, as they are printed; None where they are not named."""
    where: str
    """The place in the work at which it stands."""
    evidence: str
    """How it was read: a key of `EVIDENCE`."""

    def __post_init__(self) -> None:
        _check_evidence(self.evidence)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A printed difference of two printed numbers. Raises UserError for evidence of an unknown kind."""

    says: str
    """What is claimed."""
    value: Decimal
    """The printed difference; 0 where both numbers print the same thing."""
    unit: str
    """The unit of the number."""
    minus: tuple[Number, Number]
    """The numbers whose difference it should be, the first minus the second."""
    where: str
    """The place in the work at which it stands."""
    evidence: str
    """How it was read: a key of `EVIDENCE`."""

    def __post_init__(self) -> None:
        _check_evidence(self.evidence)

    @property
    def computed(self) -> Decimal:
        """The difference of the two printed numbers."""
        return self.minus[0].value - self.minus[1].value

    @property
    def verdict(self) -> str:
        """Whether the arithmetic of what is printed holds.

        `holds`; `within rounding`: off by no more than half a unit of the last digit of each printed number; else how far off.
        Two prints of one thing `agree`, or `differ` by so much.
        """
        off = abs(self.computed - self.value)
        if not self.value:
            return f"differ by {off}" if off else "agree"
        slack = sum((_half_unit(x) for x in (self.value, self.minus[0].value, self.minus[1].value)), Decimal(0))
        if off == 0:
            return "holds"
        return "within rounding" if off <= slack else f"does not hold: off by {off}"


@dataclass(frozen=True, kw_only=True)
class Ours:
    """An arm of a study of ours minus another. Raises UserError for an unknown measure."""

    study: str
    """The name of the study."""
    arm: str
    """The arm."""
    against: str
    """The arm that it is held against."""
    measure: str
    """What they are compared by: `accuracy` or `loss`."""

    def __post_init__(self) -> None:
        if self.measure not in ("accuracy", "loss"):
            raise UserError(f"results/paper: ours.measure must be accuracy or loss, got {self.measure!r}.")


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A published difference, and which of ours stands beside it."""

    says: str
    """What is compared."""
    theirs: tuple[Number, Number]
    """The published numbers, the first minus the second."""
    ours: Ours
    """Our difference."""
    note: str = ""
    """What a reader should know of the comparison."""

    @property
    def value(self) -> Decimal:
        """The published difference."""
        return self.theirs[0].value - self.theirs[1].value


@dataclass(frozen=True, kw_only=True)
class TwoBits:
    """The paper's rows at 2 bits, beside ours."""

    study: str
    """Our study of them."""
    rows: tuple[tuple[str, str | None, Number | None], ...]
    """The method, our arm in the study, and the published number; None where there is none."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is published in one work: a file of `results/paper`."""

    work: str
    """The work's short name."""
    source: str
    """The place at which the work is published."""
    numbers: dict[str, Number]
    """The numbers that it prints, by names that the file itself uses."""
    claims: list[Claim] = field(default_factory=list)
    """The differences that the work prints."""
    beside: list[Beside] = field(default_factory=list)
    """Differences beside which one of ours is shown."""
    two_bits: TwoBits | None = None
    """The rows of the work at 2 bits."""
    not_found: list[str] = field(default_factory=list)
    """What was looked for and not found at a source that could be read."""


def read_works(folder: Path) -> list[Work]:
    """The works of all files, MGVQ's first. Raises UserError, naming the file, for missing or unknown keys and numbers."""
    files = sorted(folder.glob("*.yaml"), key=lambda file: (file.stem != "mgvq", file.stem))
    if not files:
        raise UserError(f"{folder} has no *.yaml; published numbers are kept there.")
    return [_read(file) for file in files]


def _read(file: Path) -> Work:
    try:
        # Digits as printed: 67.0 has one more than 67.
        raw = yaml.load(file.read_text(encoding="utf-8"), Loader=_Printed)
        numbers = {name: _make(Number, entry) for name, entry in raw.pop("numbers").items()}
        claims = [_make(Claim, {**c, "minus": _named(numbers, c["minus"])}) for c in raw.pop("claims", [])]
        beside = [
            _make(Beside, {**b, "theirs": _named(numbers, b["theirs"]), "ours": _make(Ours, b["ours"])})
            for b in raw.pop("beside", [])
        ]
        rows = raw.pop("two_bits", None)
        return _make(Work, {**raw, "numbers": numbers, "claims": claims, "beside": beside, "two_bits": _two_bits(rows, numbers)})
    except (TypeError, KeyError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{file} is no valid list of published numbers: {error}") from error


class _Printed(yaml.SafeLoader):
    """A YAML loader that makes Decimals of numbers, with the digits that are printed."""


for _tag in ("int", "float"):
    _Printed.add_constructor(f"tag:yaml.org,2002:{_tag}", lambda loader, node: Decimal(loader.construct_scalar(node)))  # type: ignore[arg-type]


def _make(kind: type[_Entry], entry: dict[str, Any]) -> _Entry:
    return kind(**entry)


def _named(numbers: dict[str, Number], names: Sequence[str]) -> tuple[Number, Number]:
    first, second = names
    return numbers[first], numbers[second]


def _two_bits(raw: dict[str, Any] | None, numbers: dict[str, Number]) -> TwoBits | None:
    if raw is None:
        return None
    rows = [(row["method"], row["arm"], numbers[row["published"]] if "published" in row else None) for row in raw["rows"]]
    return TwoBits(study=raw["study"], rows=tuple(rows))


def _check_evidence(tag: str) -> None:
    if tag not in EVIDENCE:
        raise UserError(f"results/paper: evidence must be one of {', '.join(EVIDENCE)}, got {tag!r}.")


def _half_unit(value: Decimal) -> Decimal:
    return Decimal((0, (5,), int(value.as_tuple().exponent) - 1))


def mismatch(number: Number, *, model: str, benchmark: str, bits: float, measure: str) -> list[str]:
    """Why ours cannot be held against the number; empty where it can. A model's name here is the paper's in lower case with
    underscores (`internvl2_26b`), a benchmark's likewise."""
    reasons = []
    if _slug(number.model) != model:
        reasons.append(f"other model ({model})")
    if number.benchmark is None:
        reasons.append("benchmark not named")
    elif _slug(number.benchmark) != benchmark:
        reasons.append(f"other benchmark ({benchmark})")
    if number.metric != measure:
        reasons.append(f"{measure}, not {number.metric}")
    if number.bits is None:
        reasons.append("bits not named")
    elif abs(bits - float(number.bits)) > 0.05:
        reasons.append(f"{bits:.2f} bits, not {number.bits}")
    return reasons


def _slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "_", name.lower())


def judge(published: Decimal, mean: float, low: float, high: float) -> str:
    """The verdict on our mean and interval where they can be held against a published number.

    `reproduced`: ours rounds to the published one; `inside the interval`: the published one lies in ours; else `not reproduced`.
    """
    if abs(Decimal(str(mean)) - published) <= _half_unit(published):
        return "reproduced"
    return "inside the interval" if low <= float(published) <= high else "not reproduced"
