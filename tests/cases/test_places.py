"""Folders that cannot be used, damaged caches and runs, faults that all runs share: told in a sentence, nothing is lost."""

import errno
import fcntl
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import declare_done
from omegaconf import OmegaConf
from safetensors import SafetensorError

from mgvq.checkpoint.digests import write_digests
from mgvq.cli import runs as command
from mgvq.errors import SharedFault, UserError
from mgvq.runs import cache
from mgvq.runs.cache import statistics
from mgvq.runs.device import check_device
from mgvq.runs.files import disk_faults_told, share
from mgvq.runs.store import RunFolder
from mgvq.studies.launch import choose, launch
from mgvq.studies.launchers.job import Command
from mgvq.studies.plan import PlannedRun
from mgvq.tracker.wandb import Wandb
from mgvq.types import Site, SiteStats

SITE = Site("m.q_proj", "language", "q_proj", 0, 4, 4)
KEY = {"key": 1}


def bank() -> dict[Site, SiteStats]:
    return {SITE: SiteStats({"image": 1, "text": 2}, {m: torch.full((4, 4), 0.1) for m in ("image", "text")})}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1  # in the data: the file can be read all the same
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def write_garbage(file: Path) -> None:
    file.write_bytes(b"\xff\xfe garbage")


DAMAGES = [flip, truncate, empty, write_garbage]
names = lambda case: getattr(case, "__name__", None)  # noqa: E731


@pytest.mark.parametrize("what", [".safetensors", ".sha256"])
@pytest.mark.parametrize("damage", [*DAMAGES, Path.unlink], ids=names)
def test_damaged_statistics_are_set_aside_and_collected_again(
    damage: Callable[[Path], object], what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    statistics(tmp_path, KEY, bank, [SITE])
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    damage(file.with_suffix(what))
    calls = []
    found = statistics(tmp_path, KEY, lambda: calls.append(1) or bank(), [SITE])
    assert calls == [1]
    assert torch.equal(found[SITE].gram["image"], bank()[SITE].gram["image"])
    assert file.read_bytes() == whole
    if file.with_suffix(what) != file or damage is not Path.unlink:  # of a file that is gone nothing is said
        assert f"{file} " in caplog.text
        assert "collected again" in caplog.text
        assert file.with_suffix(".bad").is_file()
    statistics(tmp_path, KEY, lambda: pytest.fail("they were written"), [SITE])


@contextmanager
def no_locks(*_: object) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", raising(OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))))
        yield


@contextmanager
def read_only(results: Path) -> Iterator[None]:
    """The folder is like a mount that cannot be written: the tests may run as a user whom permissions do not stop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "mkdir", raising(OSError(errno.EROFS, os.strerror(errno.EROFS), str(results))))
        yield


@contextmanager
def is_a_file(results: Path) -> Iterator[None]:
    results.write_text("not a folder")
    yield


@contextmanager
def under_a_file(results: Path) -> Iterator[None]:
    results.parent.rmdir()
    results.parent.write_text("not a folder")
    yield


@contextmanager
def cannot_be_made(*_: object) -> Iterator[None]:
    """No folder can be made, as under /proc."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "mkdir", raising(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))))
        yield


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("place", [no_locks, read_only, is_a_file, under_a_file, cannot_be_made], ids=names)
def test_results_that_cannot_be_used_are_refused_by_name(place: Callable, tmp_path: Path) -> None:
    results = tmp_path / "parent" / "results"
    results.parent.mkdir()
    with place(results), pytest.raises(SharedFault) as caught:
        RunFolder(results / "runs" / "r").check_writable()
    assert "results" in str(caught.value) or str(results.parent) in str(caught.value)
    assert "MGVQ_RESULTS" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [no_locks, read_only, is_a_file, under_a_file, cannot_be_made], ids=names)
def test_a_cache_that_cannot_be_written_warns(place: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "parent" / "results"
    folder.parent.mkdir()
    with place(folder):
        assert list(statistics(folder, KEY, bank, [SITE])) == [SITE]
    assert caplog.text
    assert SharedFault.MARK not in caplog.text, "this run goes on"


FULL = {
    "of the system": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "of safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "quota": OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
}


@pytest.mark.parametrize("error", FULL.values(), ids=list(FULL))
def test_a_full_disk_is_told_with_its_place(error: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SharedFault, match="Make room") as caught, disk_faults_told(tmp_path):
        raise error
    assert str(tmp_path) in str(caught.value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "save_file", raising(error))
        assert list(statistics(tmp_path / "cache", KEY, bank, [SITE])) == [SITE]
    assert "not kept" in caplog.text
    assert not list((tmp_path / "cache").glob("*.s*"))


@pytest.mark.parametrize("error", [ValueError("no space"), PermissionError(errno.EACCES, "denied", "/elsewhere"), UserError("x")])
def test_other_errors_are_not_taken_for_a_full_disk(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, disk_faults_told(tmp_path):
        raise error
    assert caught.value is error


def test_files_can_be_read_by_other_users(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "r")
    old = os.umask(0o022)
    try:
        statistics(tmp_path / "cache", KEY, bank, [SITE])
        with folder:
            (folder.path / "weights").touch(0o600)
        share(tmp_path / "runs" / "r" / "weights")
    finally:
        os.umask(old)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o644}, files


def test_an_interrupt_leaves_failed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "r")
    with pytest.raises(KeyboardInterrupt), folder:
        raise KeyboardInterrupt("SIGTERM")
    assert (folder.path / "FAILED").read_text().endswith("KeyboardInterrupt: SIGTERM\n")
    assert not folder.is_done()


def test_a_full_disk_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "runs" / "r")
    monkeypatch.setattr(RunFolder, "_write", raising(FULL["of the system"]))
    with pytest.raises(ZeroDivisionError), folder:
        raise ZeroDivisionError


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A run with a checkpoint, and statistics."""
    run = tmp_path / "runs" / "r"
    (run / "checkpoint").mkdir(parents=True)
    for name in ("mgvq.safetensors", "config.json", "chat_template.jinja"):
        (run / "checkpoint" / name).write_text(f"{name} as it was written")
    write_digests(run / "checkpoint")
    (run / "metrics.json").write_text('{"loss": 1.0, "flags": []}')
    declare_done(run)
    statistics(tmp_path / "cache" / "statistics", KEY, bank, [SITE])
    (tmp_path / "runs" / "unfinished").mkdir()
    return tmp_path


def verified(*folders: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mgvq-runs", "verify", *map(str, folders)])
        with pytest.raises(SystemExit) as ended:
            command.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_what_was_written_is_verified(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verified(results) == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == "checked: 1 runs, 1 checkpoints, 1 files of statistics, 0 files of states; all as they were written\n"
    shutil.copytree(results / "runs" / "r" / "checkpoint", results / "copied")
    assert verified(results / "copied") == 0
    assert "1 checkpoints" in capsys.readouterr().err
    assert verified(results / "missing") == 2


@pytest.mark.parametrize("damage", [*DAMAGES, Path.unlink], ids=names)
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("runs/r/metrics.json", {"run"}),
        ("runs/r/checkpoint/mgvq.safetensors", {"run", "checkpoint"}),
        ("runs/r/checkpoint/chat_template.jinja", {"run", "checkpoint"}),
        ("runs/r/checkpoint/mgvq.digests.json", {"run", "checkpoint"}),
        ("runs/r/DONE", {"run"}),
        ("cache/statistics/*.safetensors", {"statistics"}),
        ("cache/statistics/*.sha256", {"statistics"}),
    ],
)
def test_verify_names_what_is_bad(
    name: str, kinds: set[str], damage: Callable[[Path], object], results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = results.glob(name)
    damage(file)
    if damage is Path.unlink and name in ("runs/r/DONE", "cache/statistics/*.safetensors"):  # no result, no statistics: not bad
        assert verified(results) == 0
        return
    assert verified(results) == 1
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert {line.split(":")[0].removeprefix("BAD ") for line in lines} == kinds
    assert len(lines) == len(kinds)
    assert "bad: " in told.err


def test_a_checkpoint_that_was_deleted_is_missed(results: Path) -> None:
    folder = RunFolder(results / "runs" / "r")
    assert folder.missing_files() == []
    shutil.rmtree(folder.checkpoint)
    assert "checkpoint/mgvq.safetensors" in folder.missing_files()
    folder.reopen()
    assert not folder.is_done()


@pytest.mark.parametrize(("last_words", "started"), [(SharedFault("the disk is full."), 1), (UserError("a bad value"), 3)])
def test_a_fault_that_all_runs_share_ends_a_study(
    last_words: UserError, started: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(run: PlannedRun, log: Path, processes: int) -> Command:
        return Command([sys.executable, "-c", f"import sys; sys.exit({str(last_words)!r})"], {}, str(tmp_path), log)

    monkeypatch.setattr("mgvq.studies.launch.command", command)
    runs = [PlannedRun(f"arm {i}", {}, 0, (), RunFolder(tmp_path / "runs" / f"r{i}"), OmegaConf.create()) for i in range(3)]
    failures = launch(runs, choose("local", 1, None))
    assert len(failures) == started
    assert all(str(last_words) in failure.output for failure in failures)


def test_a_device_that_is_not_here_is_a_fault_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SharedFault, match="device=cuda: CUDA_VISIBLE_DEVICES hides all"):
        check_device("cuda")
    check_device("cpu")
    check_device("auto")


def test_projects_have_folders_of_their_own(tmp_path: Path) -> None:
    ids = [
        Wandb(path=str(tmp_path), project=project, mode="offline", timeout_s=1.0, group=None, name=None).folder_name("0123")
        for project in ("one", "another")
    ]
    assert ids == ["0123-one", "0123-another"]
