"""The folder of a run: claimed by a lock, filled, and declared done last of all."""

import hashlib
import json
import os
import shutil
import socket
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd
import yaml

from mgvq.errors import UserError


class RunFolder:
    """`results/runs/<id>/`. Used as a context: entering claims the folder, leaving it without an error writes DONE.

    A folder without DONE is no result: nothing reads it, and the next run of the same settings starts it afresh. DONE holds
    the SHA-256 of every file beside it.
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
        """Raises UserError where another live process holds the folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = self.path / "LOCK"
        mine = f"{socket.gethostname()} {os.getpid()}"
        while True:
            try:
                with lock.open("x") as file:
                    file.write(mine)
                break
            except FileExistsError:
                self._break_stale(lock)
        for left in self.path.iterdir():  # what an interrupted run left behind
            if left.name != "LOCK":
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        return self

    @staticmethod
    def _break_stale(lock: Path) -> None:
        try:
            host, pid = lock.read_text().split()
        except (FileNotFoundError, ValueError):
            host, pid = "", ""
        if host and host != socket.gethostname():
            raise UserError(f"{lock} is held by process {pid} on {host}. If that one is gone, delete the file and run again.")
        if pid and Path(f"/proc/{pid}").exists() and int(pid) != os.getpid():
            raise UserError(f"{lock.parent} is being written by process {pid} of this machine; wait for it or stop it.")
        lock.unlink(missing_ok=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._finish()
        else:
            self._write("FAILED", "".join(traceback.format_exception(kind, error, trace)).encode())
        (self.path / "LOCK").unlink(missing_ok=True)

    def _finish(self) -> None:
        files = sorted(f for f in self.path.rglob("*") if f.is_file() and f.name != "LOCK")
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
