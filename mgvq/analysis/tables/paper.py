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
    """A number as it is printed: what it measures, on what, and where it stands. `benchmark` None: not named there."""

    value: Decimal
    unit: str
    metric: str
    method: str
    model: str
    benchmark: str | None
    bits: Decimal
    where: str
    evidence: str

    def __post_init__(self) -> None:
        _check_evidence(self.evidence)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A printed difference `value`, which should be that of the two numbers in `minus`; 0: both print the same thing."""

    says: str
    value: Decimal
    unit: str
    minus: tuple[Number, Number]
    where: str
    evidence: str

    def __post_init__(self) -> None:
        _check_evidence(self.evidence)

    @property
    def computed(self) -> Decimal:
        return self.minus[0].value - self.minus[1].value

    @property
    def verdict(self) -> str:
        """`holds`; `within rounding`: off by no more than half a unit of the last digit of each printed number; else how far off.

        Of two prints of one thing: `agree`, or by how much they `differ`.
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
    """An arm of a study minus another, by accuracy or loss."""

    study: str
    arm: str
    against: str
    measure: str

    def __post_init__(self) -> None:
        if self.measure not in ("accuracy", "loss"):
            raise UserError(f"results/paper: ours.measure must be accuracy or loss, got {self.measure!r}.")


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A published difference, the first number minus the second, and which of ours stands beside it."""

    says: str
    theirs: tuple[Number, Number]
    ours: Ours
    note: str = ""

    @property
    def value(self) -> Decimal:
        return self.theirs[0].value - self.theirs[1].value


@dataclass(frozen=True, kw_only=True)
class TwoBits:
    """The paper's 2-bit rows: method, our arm in `study` (or None) and the published number (or None)."""

    study: str
    rows: tuple[tuple[str, str | None, Number | None], ...]


@dataclass(frozen=True, kw_only=True)
class Work:
    """One file of `results/paper`."""

    work: str
    source: str
    numbers: dict[str, Number]
    claims: list[Claim] = field(default_factory=list)
    beside: list[Beside] = field(default_factory=list)
    two_bits: TwoBits | None = None


def read_works(folder: Path) -> list[Work]:
    """All files, MGVQ's first. Raises UserError, naming the file, for missing or unknown keys and names of numbers."""
    files = sorted(folder.glob("*.yaml"), key=lambda file: (file.stem != "mgvq", file.stem))
    if not files:
        raise UserError(f"{folder} has no *.yaml; published numbers are kept there.")
    return [_read(file) for file in files]


def _read(file: Path) -> Work:
    try:
        # Digits as printed: 67.0 has one more than 67.
        raw = yaml.load(file.read_text(), Loader=_Printed)
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
    """Numbers become Decimal, with the digits that are printed."""


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
    if abs(bits - float(number.bits)) > 0.05:
        reasons.append(f"{bits:.2f} bits, not {number.bits}")
    return reasons


def _slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "_", name.lower())


def judge(published: Decimal, mean: float, low: float, high: float) -> str:
    """Of comparable numbers. `reproduced`: ours rounds to the published one; `inside the interval`: that lies in ours; else
    `not reproduced`."""
    if abs(Decimal(str(mean)) - published) <= _half_unit(published):
        return "reproduced"
    return "inside the interval" if low <= float(published) <= high else "not reproduced"
