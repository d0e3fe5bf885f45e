"""The files from which a stopped run goes on."""

import subprocess
from pathlib import Path

import pytest
import torch

from mgvq.runs.journal import Journal
from mgvq.runs.provenance import provenance


def test_entries_outlive_the_process_and_other_code_takes_none_of_them(tmp_path) -> None:
    Journal(tmp_path / "run", "this code")["block-0001"] = {"codes": torch.arange(3)}
    again = Journal(tmp_path / "run", "this code")
    assert list(again) == ["block-0001"]
    assert torch.equal(again["block-0001"]["codes"], torch.arange(3))
    assert not Journal(tmp_path / "run", "other code")
    again.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:70] + bytes([b[70] ^ 1]) + b[71:], lambda _: b""])
def test_an_entry_that_is_not_what_was_written_is_not_there(tmp_path, damage) -> None:
    journal = Journal(tmp_path / "run", "code")
    journal["block"] = [1, 2]
    (file,) = (tmp_path / "run").glob("block.*")
    file.write_bytes(damage(file.read_bytes()))
    assert "block" not in journal
    with pytest.raises(KeyError):
        journal["block"]


def test_where_nothing_can_be_written_the_run_goes_on(tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("in the way")
    journal = Journal(tmp_path / "file" / "run", "code")
    journal["block"] = 1
    assert "block" not in journal
    assert "will have to begin again" in caplog.text


def test_a_new_module_is_other_code(tmp_path, monkeypatch) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)

    def write(name: str, text: str) -> str | None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return provenance()["dirty"]

    monkeypatch.setattr("mgvq.runs.provenance.checkout", lambda: tmp_path)
    git("init", "--quiet")
    write("mgvq/old.py", "")
    write(".gitignore", "*.pyc\n")
    git("add", ".")
    git("commit", "--quiet", "--message", "old")
    assert provenance()["dirty"] is None
    assert write("mgvq/old.pyc", "") is None
    assert write("results/new.md", "") is None, "no code"
    states = [write("mgvq/new.py", "a"), write("mgvq/new.py", "b"), write("conf/neu é.yaml", "c"), write("mgvq/old.py", "d")]
    assert None not in states
    assert len(set(states)) == 4


def test_blocks_of_other_code_that_cannot_be_deleted_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be another user's files: nothing is read, and nothing is written, so that their owner's run can go on."""
    Journal(tmp_path / "run", "old code")["block"] = 1.0
    monkeypatch.setattr(Journal, "close", lambda _: None)
    journal = Journal(tmp_path / "run", "new code")
    with pytest.raises(KeyError):
        journal["block"]
    journal["another"] = 2.0
    monkeypatch.undo()
    assert dict(Journal(tmp_path / "run", "old code")) == {"block": 1.0}
