"""The folder of a run: claimed by a lock, filled, and declared done last of all."""

import fcntl
import hashlib
import json
import os
import shutil
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd
import yaml

from mgvq.errors import UserError


class RunFolder:
    """`results/runs/<id>/`. Used as a context: entering claims and empties the folder, leaving it without an error writes DONE.

    A folder that is done when it is entered stays as it is. A folder without DONE is no result: nothing reads it, and the next
    run of the same settings starts it afresh. DONE holds the SHA-256 of every file beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    def is_done(self) -> bool:
        return (self.path / "DONE").is_file()

    def metrics(self) -> dict[str, Any]:
        """Raises UserError for a run that is not finished."""
        if not self.is_done():
            raise UserError(f"{self.path} is not finished (no DONE): its numbers are not used. Run its settings again.")
        return json.loads((self.path / "metrics.json").read_text())

    def __enter__(self) -> "RunFolder":
        """Raises UserError where another process holds the folder. The kernel drops the lock of a process that dies."""
        locks = self.path.parent / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        self._lock = (locks / self.path.name).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(f"{self.path} is being written by another process; wait for it or stop it.") from None
        self.path.mkdir(exist_ok=True)
        self._was_done = self.is_done()
        if not self._was_done:
            for left in self.path.iterdir():  # what an interrupted run left behind
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._write("FAILED", "".join(traceback.format_exception(kind, error, trace)).encode())
        elif not self._was_done:
            self._finish()
        self._lock.close()

    def _finish(self) -> None:
        files = sorted(f for f in self.path.rglob("*") if f.is_file())
        digests = {}
        for file in files:
            with file.open("rb") as stream:
                digests[str(file.relative_to(self.path))] = hashlib.file_digest(stream, "sha256").hexdigest()
        self._write("DONE", json.dumps(digests, indent=1).encode())

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self._write(name, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())

    def write_yaml(self, name: str, value: Mapping[str, Any]) -> None:
        self._write(name, yaml.safe_dump(dict(value), sort_keys=False).encode())

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        temporary = self.path / f"{name}.tmp"
        table.to_parquet(temporary, index=False)
        temporary.rename(self.path / name)

    def _write(self, name: str, content: bytes) -> None:
        """Complete or not at all, and on the disk before it has its name."""
        temporary = self.path / f"{name}.tmp"
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self.path / name)
