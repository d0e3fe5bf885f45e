"""The folder of a run: claimed by a lock, filled, and declared done last of all."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pandas as pd
import yaml

from mgvq.errors import UserError
from mgvq.runs.files import disk_faults_told, open_lock, share, try_lock

log = logging.getLogger(__name__)
SCHEMA_VERSION = 1  # of metrics.json: what its names mean


class RunFolder:
    """`results/runs/<id>/`. Used as a context: entering claims and empties the folder, leaving it without an error writes DONE.

    Of several processes that enter one folder the first fills it while the others wait; the kernel drops the lock of one that
    dies. A folder that is done when it is entered stays as it is. A folder without DONE is no result: nothing reads it, and the
    next run of the same settings starts it afresh. DONE holds the SHA-256 of every file beside it, and is written when these are
    on the disk: a power cut leaves a complete run or none. Processes on several machines need a file system on which `flock`
    reaches all of them (NFS 4, Lustre mounted with `flock`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def partial(self) -> Path:
        """Where a run that goes block by block keeps its finished blocks until it is done."""
        return self.path.parents[1] / "partial" / self.path.name

    def discard_partial(self) -> None:
        """Throw away the finished blocks of a run that is done, also those that an earlier start has left."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def is_done(self) -> bool:
        return (self.path / "DONE").is_file()

    def metrics(self) -> dict[str, Any]:
        """Raises UserError for a run that is not finished or is of another version, and where the file is not the one that it
        wrote."""
        if not self.is_done():
            raise UserError(f"{self.path} is not finished (no DONE): its numbers are not used. Run its settings again.")
        self.verify("metrics.json")
        metrics = json.loads((self.path / "metrics.json").read_text(encoding="utf-8"))
        if (version := metrics.get("schema_version", SCHEMA_VERSION)) != SCHEMA_VERSION:
            raise UserError(
                f"{self.path}/metrics.json has schema_version {version!r}, and this version of mgvq reads {SCHEMA_VERSION}: its "
                "numbers are not used. Report it with the version in its provenance.json, or delete the folder and run its "
                "settings again."
            )
        return metrics

    def verify(self, *names: str) -> None:
        """Compare the run's files with the digests in DONE: all of them, or those that `names` names.

        Raises UserError, with the file, where one has changed, is missing, or was not written by the run, and where DONE itself
        cannot be read.
        """
        remedy = "its numbers are not used. Delete the folder and run its settings again."
        try:
            digests = json.loads((self.path / "DONE").read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}/DONE holds no digests of the run's files: {remedy}") from error
        if not isinstance(digests, dict) or not digests:
            raise UserError(f"{self.path}/DONE holds no digests of the run's files: {remedy}")
        for name in names or digests:
            file = self.path / name
            if name not in digests or not file.is_file():
                raise UserError(f"{file} is missing{'' if name in digests else ' in DONE'}: {remedy}")
            with file.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != digests[name]:
                    raise UserError(f"{file} is not the file that the run wrote: {remedy}")

    def reserve(self) -> IO[bytes] | None:
        """A file that whoever starts the run in another process holds open until that has ended.

        None where somebody else holds it.
        """
        lock = self._lock_file(".reserved")
        if try_lock(lock):
            return lock
        lock.close()
        return None

    def check_writable(self) -> None:
        """Raises SharedFault, which names the folder, where the results cannot be written or locked; takes no time."""
        with self._lock_file() as lock:
            try_lock(lock)
        with disk_faults_told(self.path), tempfile.TemporaryFile(dir=self.path.parent) as file:
            file.write(b"room for a little")

    def missing_files(self) -> list[str]:
        """The files that DONE names and that are gone; empty where DONE cannot be read, which `verify` tells."""
        try:
            return [name for name in json.loads((self.path / "DONE").read_bytes()) if not (self.path / name).is_file()]
        except (OSError, ValueError, TypeError):
            return []

    def reopen(self) -> None:
        """Take the folder's DONE away: the next run of its settings starts it afresh."""
        with disk_faults_told(self.path):
            (self.path / "DONE").unlink(missing_ok=True)

    def _lock_file(self, suffix: str = "") -> IO[bytes]:
        return open_lock(self.path.parent / ".locks" / f"{self.path.name}{suffix}")

    def __enter__(self) -> "RunFolder":
        """Waits while another process holds the folder."""
        self._lock = self._lock_file()
        if not try_lock(self._lock):
            log.info("waiting for another process, which is writing %s", self.path)
            try_lock(self._lock, wait=True)
        self.path.mkdir(exist_ok=True)
        self._was_done = self.is_done()
        if not self._was_done:
            for left in self.path.iterdir():  # what an interrupted run left behind
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._was_done:
            pass
        elif error is None:
            self._finish()
        else:
            with contextlib.suppress(OSError):  # on a full disk the error itself is what has to be told
                self._write("FAILED", "".join(traceback.format_exception(kind, error, trace)).encode())
        self._lock.close()

    def _finish(self) -> None:
        files = sorted(f for f in self.path.rglob("*") if f.is_file())
        digests = {}
        for file in files:
            share(file)
            with file.open("rb") as stream:
                digests[str(file.relative_to(self.path))] = hashlib.file_digest(stream, "sha256").hexdigest()
                os.fsync(stream.fileno())
        for folder in {self.path.parent, self.path, *(file.parent for file in files)}:
            _sync_names(folder)
        self._write("DONE", json.dumps(digests, indent=1).encode())
        _sync_names(self.path)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self._write(name, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())

    def write_yaml(self, name: str, value: Mapping[str, Any]) -> None:
        self._write(name, yaml.safe_dump(dict(value), sort_keys=False).encode())

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        temporary = self.path / f"{name}.tmp"
        table.to_parquet(temporary, index=False)
        temporary.rename(self.path / name)

    def _write(self, name: str, content: bytes) -> None:
        """Writes a file completely or not at all; its content is on the disk before it has its name."""
        temporary = self.path / f"{name}.tmp"
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self.path / name)


def _sync_names(folder: Path) -> None:
    """Brings to the disk which names the folder holds."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
