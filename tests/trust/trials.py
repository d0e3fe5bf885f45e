"""What all kinds of trials have in common: the outcome of one, the record of all, and the table that is made of it.

A kind is one file in `kinds/`; its docstring says what is tried and what has to hold, and stands in the table. It has

* `WHOLE` and `SAMPLE`: how many trials `make trust` and `make test` ask for,
* `missing() -> str`: why it cannot be tried on this machine, as a sentence; empty where it can,
* `trials(scratch, number) -> Iterator[Outcome]`: that many seeded trials, the first ones of a longer series being those of a
  shorter one; `scratch` is an empty folder.
"""

import dataclasses
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

KINDS = Path(__file__).parent / "kinds"
sys.path.append(str(Path(__file__).parents[1]))  # where kinds find what the tests have too
COUNTS = ("faults", "survived", "lost", "silent", "compared", "equal")
WHERE = ("commit", "date", "cores")
HEAD = ("kind", "case", "trials", "faults", "survived", "lost", "silent", "files compared", "equal", *WHERE)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one trial found."""

    case: str
    """Which of the kind's cases it was: trials of one case share a line of the table."""
    faults: int = 0
    """How many faults were injected."""
    survived: int = 0
    """How many of these left everything as it has to be; of a file that was damaged, whether it was refused or did no harm."""
    lost: int = 0
    """How many things that were finished were gone, or that were half written were believed."""
    silent: int = 0
    """How many faults ended something without a word of what to do."""
    compared: int = 0
    """How many files were compared with those of an undisturbed run."""
    equal: int = 0
    """How many of these have the same bytes."""
    wrong: str = ""
    """What did not hold, where that is not a matter of counts."""
    not_run: str = ""
    """Why this trial could not be made here."""

    @property
    def holds(self) -> bool:
        counts = self.faults == self.survived and self.compared == self.equal and not self.lost and not self.silent
        return counts and not self.wrong


def load_kind(file: Path) -> ModuleType:
    """The module of a kind. Raises TypeError where it lacks something that every kind has."""
    spec = importlib.util.spec_from_file_location(f"trust_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    kind = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kind)
    if lacking := [name for name in ("WHOLE", "SAMPLE", "missing", "trials") if not hasattr(kind, name)]:
        raise TypeError(f"{file} has no {', '.join(lacking)}; the docstring of {__file__} says what a kind has.")
    return kind


@cache
def kinds() -> dict[str, ModuleType]:
    """All kinds by their names."""
    return {file.stem.replace("_", " "): load_kind(file) for file in sorted(KINDS.glob("*.py"))}


def summary(kind: ModuleType, outcomes: Iterable[Outcome], seconds: float, not_run: str = "") -> dict[str, Any]:
    """The record of one kind: what its trials found, added up by case; `not_run` says why it was not, or not wholly, tried."""
    cases: dict[str, dict[str, int]] = {}
    wrong, left = [], [not_run] if not_run else []
    for outcome in outcomes:
        if outcome.not_run:
            left.append(f"{outcome.case}: {outcome.not_run}")
            continue
        found = cases.setdefault(outcome.case, dict.fromkeys(("trials", *COUNTS), 0))
        found["trials"] += 1
        for name in COUNTS:
            found[name] += getattr(outcome, name)
        if not outcome.holds:
            wrong.append(f"{outcome.case}: {outcome.wrong or dataclasses.asdict(outcome)}")
    headline = " ".join((kind.__doc__ or "").partition("\n\n")[0].split())
    return {"headline": headline, "cases": cases, "minutes": round(seconds / 60, 1), "wrong": wrong, "not_run": left}


def holds(record: Mapping[str, Any]) -> bool:
    """Whether nothing that was tried failed."""
    return not any(kind["wrong"] for kind in record["kinds"].values())


def table(record: Mapping[str, Any]) -> str:
    """Markdown: how it ended, a line for each case, what each kind is, what did not hold, what was not run.

    `record["kinds"]` has a `summary` of each kind, with the commit, the day and the number of cores that it was tried on.
    """
    rows, total, notes, wrong, left = [], dict.fromkeys(("trials", *COUNTS), 0), [], [], []
    for name, kind in record["kinds"].items():
        took = f" ({kind['minutes']} minutes)" if kind["cases"] else ""
        notes.append(f"* **{name}**{took}: {kind['headline']}")
        wrong += [f"* {name}: {text}" for text in kind["wrong"]]
        left += [f"* {name}: {text}" for text in kind["not_run"]]
        for case, found in kind["cases"].items():
            rows.append([name, case, *found.values(), *(kind[word] for word in WHERE)])
            total = {key: total[key] + found[key] for key in total}
    rows.append(["all", "", *total.values(), *[""] * len(WHERE)])
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (HEAD, ["---"] * 2 + ["---:"] * (len(HEAD) - 2), *rows)]
    verdict = (
        f"Everything that was tried holds: {len(rows) - 1} cases in {total['trials']} trials; {total['survived']} of "
        f"{total['faults']} faults survived, {total['lost']} things lost, {total['silent']} faults silent; "
        f"{total['equal']} of {total['compared']} compared files equal."
        if holds(record)
        else "**Not everything that was tried holds.**"
    )
    told = [
        verdict if total["trials"] else "Nothing was tried yet.",
        "\n".join(lines),
        "\n".join(notes),
        "What did not hold:\n\n" + "\n".join(wrong) if wrong else "",
        "Not run:\n\n" + "\n".join(left) if left else "Nothing was left out.",
    ]
    return "\n\n".join(text for text in told if text) + "\n"
