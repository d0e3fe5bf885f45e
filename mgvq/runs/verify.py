"""Whether everything under a results folder is what was written: runs, their checkpoints, cached statistics."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mgvq.checkpoint.digests import DIGESTS, check_digests
from mgvq.errors import UserError
from mgvq.runs.files import broken_seal
from mgvq.runs.store import RunFolder


@dataclass(frozen=True)
class Verified:
    """A thing that was checked."""

    path: Path
    """Run folder, checkpoint folder, or file of the cache."""
    kind: str
    """`run`, `checkpoint`, `statistics` or `teacher` (cached states of a full-precision model)."""
    fault: str | None
    """What is wrong and what mends it, in a sentence; None where nothing is."""


def verify(folders: Sequence[Path]) -> Iterator[Verified]:
    """Check all that the folders hold, each a results folder, a part of one, a run or a checkpoint, one after the other.

    A run that is not finished is no result, and is left out. Raises UserError for a folder that is missing.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: give a results folder, a run folder or a checkpoint.")
    seen: set[Path] = set()
    for folder in folders:
        for path, kind in _found(folder.absolute()):
            if path not in seen:
                seen.add(path)
                yield Verified(path, kind, _CHECKS[kind](path))


def _found(folder: Path) -> Iterator[tuple[Path, str]]:
    """What can be checked in the folder, and its kind."""
    for file in sorted(folder.rglob("*")):
        if file.name == "DONE" and file.is_file():
            yield file.parent, "run"
            if (checkpoint := RunFolder(file.parent).checkpoint).is_dir():  # without its digests too, which is a fault
                yield checkpoint, "checkpoint"
        elif file.name == DIGESTS and not (file.parent.parent / "DONE").is_file():  # one that was copied out of its run
            yield file.parent, "checkpoint"
        elif file.suffix == ".safetensors" and file.parent.name in ("statistics", "teacher"):
            yield file, file.parent.name
        elif file.suffix == ".safetensors" and file.parent.parent.name == "statistics":  # of one block
            yield file, "statistics"


def _run(path: Path) -> str | None:
    try:
        RunFolder(path).verify()
    except (UserError, OSError) as error:
        return str(error)
    return None


def _checkpoint(path: Path) -> str | None:
    if not (path / DIGESTS).is_file():
        return f"{path} has no {DIGESTS}: it was written before version 3, or has lost it. Delete the run and run it again."
    try:
        check_digests(path, everything=True)
    except (UserError, OSError) as error:
        return str(error)
    return None


def _cached(path: Path) -> str | None:
    why = broken_seal(path)
    return f"{path} {why}: the next run that needs it makes it again; it can be deleted." if why else None


_CHECKS = {"run": _run, "checkpoint": _checkpoint, "statistics": _cached, "teacher": _cached}
