"""SHA-256 of files, each read once in a process as long as it stays as it is."""

import functools
import hashlib
from pathlib import Path


def file_digest(file: Path) -> str:
    """The SHA-256 of a file in hex; that of nothing for a missing file, which is reported where the file is needed."""
    if not file.is_file():
        return hashlib.sha256().hexdigest()
    state = file.stat()
    return _read(file.absolute(), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@functools.cache
def _read(file: Path, *state: int) -> str:
    """`state` is what changes with the file: another one is read anew."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
