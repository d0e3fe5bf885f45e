"""Files of the results folder: locks, permissions, digests beside them, and faults of the disk told in a sentence."""

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mgvq.errors import SharedFault, UserError

# What the file system says where no other run would fare better, and what helps.
_FULL = "Make room; finished runs and collected statistics are kept."
_CLOSED = "Choose a results folder that can be written: MGVQ_RESULTS=FOLDER, or paths.results=FOLDER."
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EROFS: _CLOSED,
    errno.EACCES: _CLOSED,
    errno.EPERM: _CLOSED,
    errno.ENOTDIR: _CLOSED,
    errno.EEXIST: _CLOSED,
}


@contextmanager
def disk_faults_told(folder: Path) -> Iterator[None]:
    """A full disk becomes a SharedFault that names the file, or else `folder`; so does a `folder` that cannot be written.

    The libraries tell of it in errors of their own (safetensors in one without a path), so the number in the text counts too.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _number_in(str(error))
        folder = folder.absolute()
        place = Path(getattr(error, "filename", None) or folder).absolute()
        elsewhere = not (place.is_relative_to(folder) or folder.is_relative_to(place))
        if number not in _REMEDIES or (elsewhere and _REMEDIES[number] is _CLOSED):
            raise
        raise SharedFault(f"{place} cannot be written ({os.strerror(number)}). {_REMEDIES[number]}") from error


def _number_in(text: str) -> int | None:
    """The error number in the text of an exception that comes from Rust, as `... (os error 28)`."""
    return next((number for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) if f"os error {number})" in text), None)


def open_lock(file: Path) -> IO[bytes]:
    """The file to lock, made where it is missing. Raises SharedFault where its folder cannot be made or written."""
    try:
        with disk_faults_told(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
            return file.open("ab")
    except OSError as error:
        raise SharedFault(f"{file.parent} cannot be made ({error.strerror}). {_CLOSED}") from error


def check_reachable(folder: Path) -> None:
    """Raises SharedFault where the folder is not there and cannot be made, or cannot be written; makes nothing."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        why = os.strerror(errno.EACCES if nearest.is_dir() else errno.ENOTDIR)
        raise SharedFault(f"{folder.absolute()} cannot be written ({nearest}: {why}). {_CLOSED}")


def try_lock(lock: IO[bytes], *, wait: bool = False) -> bool:
    """Lock the open file; False where another process has it and `wait` is not set.

    Raises SharedFault on a file system without locks.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        raise SharedFault(
            f"{Path(lock.name).parent} is on a file system without locks ({error.strerror}), which keep two processes from "
            "writing one run. Choose a results folder on another: MGVQ_RESULTS=FOLDER, or paths.results=FOLDER."
        ) from error
    return True


def share(file: Path) -> None:
    """Let other users read the file, as far as the umask allows: safetensors writes for its own user alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    if (mode := 0o666 & ~mask) & ~file.stat().st_mode:
        file.chmod(file.stat().st_mode & 0o777 | mode)


def seal(file: Path, name: Path) -> None:
    """Write the digest of `file`, which is about to get its `name`, beside that."""
    _seal_of(name).write_text(f"{_digest(file)}\n", encoding="utf-8")
    share(_seal_of(name))


def broken_seal(file: Path) -> str | None:
    """Why the file is not the one that was sealed; None where it is."""
    try:
        sealed = _seal_of(file).read_text(errors="replace", encoding="utf-8").strip()
        return None if sealed == _digest(file) else f"has another digest than {_seal_of(file).name} says"
    except FileNotFoundError:
        return f"has no digest beside it ({_seal_of(file).name})"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _seal_of(file: Path) -> Path:
    return file.with_suffix(".sha256")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
