"""Another evaluation of a checkpoint that a finished run has made: nothing is quantised again, and the numbers are the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mgvq.runs import execute as executing
from mgvq.runs.compose import composer
from mgvq.runs.reuse import find_quantised
from mgvq.runs.store import RunFolder


def run(folder: Path, num_questions: int, *words: str) -> dict[str, Any]:
    with composer() as compose:
        cfg = compose(
            "method=rtn", "scope=language", f"evaluation.num_questions={num_questions}", "evaluation.answers=forced", *words
        )
    cfg.paths.results = str(folder.parents[1])
    metrics = executing.execute(cfg, RunFolder(folder))
    return {name: value for name, value in metrics.items() if not name.startswith(("time/", "memory/"))}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 26 questions."""
    folder = tmp_path_factory.mktemp("results") / "runs" / "first"
    run(folder, 26)
    return folder


def test_a_checkpoint_that_exists_is_evaluated_and_not_made_again(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    afresh = run(tmp_path / "runs" / "afresh", 40)
    monkeypatch.setattr(executing, "quantised", lambda *_: pytest.fail("it was quantised again"))
    again = run(first.parent / "again", 40)
    assert again == afresh
    folder = RunFolder(first.parent / "again")
    folder.verify()
    assert {f.name for f in folder.path.iterdir()} == {f.name for f in (tmp_path / "runs" / "afresh").iterdir()}
    assert json.loads((folder.path / "provenance.json").read_text())["checkpoint_of"] == "first"


def set_field(identity: dict[str, Any]) -> None:
    identity["codebook"] = {**identity["codebook"], "other": 1}


def set_evaluation(identity: dict[str, Any]) -> None:
    identity["evaluation"] = {"variant": "another"}


@pytest.mark.parametrize(
    ("change", "found"), [(set_evaluation, True), (set_field, False), (lambda identity: identity.update(threads=2), False)]
)
def test_only_the_evaluation_may_differ(change: Callable[[dict[str, Any]], None], found: bool, first: Path) -> None:
    identity = json.loads((first / "identity.json").read_text())
    change(identity)
    other = find_quantised(RunFolder(first.parent / "new"), identity)
    assert (other is not None) == found


def test_a_damaged_checkpoint_is_not_taken_over(first: Path, caplog: pytest.LogCaptureFixture) -> None:
    identity = json.loads((first / "identity.json").read_text())
    file = first / "checkpoint" / "mgvq.index"
    whole = file.read_text()
    try:
        file.write_text(whole + " ")
        assert find_quantised(RunFolder(first.parent / "new"), identity) is None
        assert f"{file} is not the file that the run wrote" in caplog.text
    finally:
        file.write_text(whole)
