"""A seeded sample of what `make trust` tries, and that a kind of trial that fails, breaks or is missing is told as that."""

import importlib
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from types import ModuleType

import pytest
import trials
import trust
from conftest import ROOT, sampled
from trials import Outcome, holds, kinds, load_kind, summary, table

HERE = {"commit": "abc", "date": "2026-11-28", "cores": 2}
SAMPLED = {name: kind for name, kind in kinds().items() if kind.SAMPLE}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", SAMPLED)
def test_a_sample_of_every_kind_holds(name: str, tmp_path: Path) -> None:
    kind = SAMPLED[name]
    if reason := kind.missing():
        pytest.skip(reason)
    outcomes = list(kind.trials(tmp_path, kind.SAMPLE))
    assert len(outcomes) == kind.SAMPLE
    assert all(outcome.holds for outcome in outcomes), [outcome for outcome in outcomes if not outcome.holds]


def test_faults_strike_functions_that_are_there() -> None:
    ended, dying = kinds()["ended runs"], kinds()["dying workers"]
    faults = dying.IN_A_RUN, dying.IN_A_WORKER, dying.IN_WANDB
    for at in (*(at for at, *_ in ended.STAGES.values()), *(fault["at"] for fault in faults)):
        module, _, name = at.partition(":")
        assert callable(attrgetter(name)(importlib.import_module(module))), at


def made_up(**members: object) -> ModuleType:
    kind = ModuleType("made_up", "Something is tried; it has to hold.")
    vars(kind).update({"WHOLE": 2, "SAMPLE": 0, "missing": lambda: "", "trials": lambda scratch, number: iter(()), **members})
    return kind


GOOD = Outcome("plain", faults=1, survived=1, compared=5, equal=5)
BAD = Outcome("plain", faults=1, survived=0, lost=1, silent=1, compared=5, equal=4, wrong="a file differs")


def test_what_holds_and_what_does_not_is_told() -> None:
    record = {"kinds": {"made up": trust.tried("made up", made_up(trials=lambda *_: iter([GOOD])), 1) | HERE}}
    assert holds(record)
    assert "| made up | plain | 1 | 1 | 1 | 0 | 0 | 5 | 5 | abc | 2026-11-28 | 2 |" in table(record)
    assert "Everything that was tried holds: 1 cases in 1 trials; 1 of 1 faults survived, 0 things lost," in table(record)
    record["kinds"]["made up"] = trust.tried("made up", made_up(trials=lambda *_: iter([GOOD, BAD])), 1) | HERE
    assert not holds(record)
    assert "| all |  | 2 | 2 | 1 | 1 | 1 | 10 | 9 |" in table(record)
    assert "**Not everything that was tried holds.**" in table(record)
    assert "* made up: plain: a file differs" in table(record)


@pytest.mark.parametrize("worse", [{"survived": 0}, {"lost": 1}, {"silent": 1}, {"equal": 4}, {"wrong": "slow"}], ids=str)
def test_one_thing_is_enough_for_a_trial_to_fail(worse: dict) -> None:
    counts = {"faults": 1, "survived": 1, "compared": 5, "equal": 5, **worse}
    assert not holds({"kinds": {"made up": summary(made_up(), [Outcome("plain", **counts)], 1.0)}})


def test_a_trial_that_raises_is_one_that_does_not_hold() -> None:
    def breaks(scratch: Path, number: int) -> Iterator[Outcome]:
        yield GOOD
        raise RuntimeError("the disk is gone")

    found = trust.tried("made up", made_up(trials=breaks), 1)
    assert found["wrong"] == ["a trial that did not end: RuntimeError: the disk is gone"]
    assert found["cases"]["plain"]["trials"] == 1


def test_one_that_is_stopped_tells_how_far_it_came() -> None:
    kept: list[dict] = []
    found = trust.tried("made up", made_up(trials=lambda *_: iter([GOOD, GOOD])), 1, kept.append)
    assert [one["not_run"] for one in kept] == [["stopped after trial 1 of 2."], ["stopped after trial 2 of 2."]]
    assert kept[0]["cases"]["plain"]["trials"] == 1
    assert found["not_run"] == []


def test_what_cannot_be_tried_here_is_named() -> None:
    found = trust.tried("made up", made_up(missing=lambda: "there is no GPU."), 1)
    text = table({"kinds": {"made up": found | HERE}})
    assert "Not run:\n\n* made up: there is no GPU." in text
    alone = summary(made_up(), [GOOD, Outcome("with a browser", not_run="there is none.")], 1.0)
    assert alone["not_run"] == ["with a browser: there is none."]
    assert list(alone["cases"]) == ["plain"]


def test_a_kind_that_lacks_something_is_named(tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text("WHOLE = 3\n")
    with pytest.raises(TypeError, match=r"half\.py has no SAMPLE, missing, trials"):
        load_kind(tmp_path / "half.py")


def test_a_seeded_sample_and_the_rest_are_all_cases() -> None:
    marked = sampled(range(100), 7)
    assert [mark.values for mark in marked] == [(number,) for number in range(100)]
    kept = [mark.values[0] for mark in marked if not mark.marks]
    assert len(kept) == 7
    assert kept == [mark.values[0] for mark in sampled(range(100), 7) if not mark.marks]
    assert kept != list(range(7))
    assert {name for mark in marked for name in [m.name for m in mark.marks]} == {"trust"}
    assert [mark.values for mark in sampled([("a", 1), ("b", 2)], 9)] == [("a", 1), ("b", 2)]


def test_kinds_that_are_not_tried_again_keep_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"old": made_up(trials=lambda *_: iter([GOOD])), "new": made_up(trials=lambda *_: iter([GOOD, GOOD]))}
    monkeypatch.setattr(trust, "kinds", lambda: found)
    monkeypatch.setattr(trust, "results_folder", lambda: tmp_path)
    for name, words in (("old", "Not run:\n\n* new: not tried yet."), ("new", "Nothing was left out.")):
        monkeypatch.setattr("sys.argv", ["trust.py", "--only", name])
        assert trust.main() == 0
        assert words in (tmp_path / "tables" / "trust.md").read_text()
    lines = (tmp_path / "tables" / "trust.md").read_text().splitlines()
    old, new = (line for line in lines if "| plain |" in line)
    assert old.startswith("| old | plain | 1 | 1 | 1 | 0 | 0 | 5 | 5 | ")
    assert new.startswith("| new | plain | 2 |")
    found["new"] = made_up(trials=lambda *_: iter([BAD]))
    monkeypatch.setattr("sys.argv", ["trust.py", "--share", ".5"])
    assert trust.main() == 1
    assert "| new | plain | 2 |" in (tmp_path / "tables" / "trust.md").read_text(), "a share is not written"


def test_the_committed_table_is_what_the_code_makes_of_its_records() -> None:
    record = trust.found(ROOT / "results")
    assert table(record) == (ROOT / "results" / "tables" / "trust.md").read_text(), "python tests/trust/trust.py --table"
    for kind in record["kinds"].values():
        assert kind["cases"] or kind["not_run"]
        for found in kind["cases"].values():
            assert list(found) == ["trials", *trials.COUNTS]
    assert holds(record), "what did not hold has to be mended before it is committed"
    kept = {file.stem.replace("_", " ") for file in (ROOT / "results" / trust.RECORDS).glob("*.json")}
    assert kept <= set(kinds()), "records of kinds that are no more"
