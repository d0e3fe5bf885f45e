"""What a run has finished before it was stopped: a file a block, from which the next start of the same run goes on."""

import hashlib
import json
import logging
import mmap
import os
import shutil
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

from mgvq.errors import SharedFault
from mgvq.runs.entries import from_bytes, to_bytes
from mgvq.runs.files import disk_faults_told

log = logging.getLogger(__name__)
_CODE = "code.json"


class Journal(MutableMapping[str, Any]):
    """A mapping whose entries are files of `folder`, each with its SHA-256 before it, written completely or not at all.

    Entries are of the code that `code` describes: those of other code are thrown away when the journal is opened, since it might
    have gone another way. An entry that is not what was written is not there. Where nothing can be written, a warning says so and
    the run goes on: it is then not resumed.
    """

    def __init__(self, folder: Path, code: Any) -> None:
        self._folder, self._broken, self._foreign = folder, False, False
        text = json.dumps(code, sort_keys=True)
        try:
            with disk_faults_told(folder):
                if folder.is_dir() and (not (folder / _CODE).is_file() or (folder / _CODE).read_text(encoding="utf-8") != text):
                    self.close()
                    self._foreign = len(self) > 0
                if not self._foreign:
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / _CODE).write_text(text, encoding="utf-8")
        except (SharedFault, OSError) as fault:
            self._give_up(fault)
        if self._foreign:
            self._give_up(OSError(f"{folder} holds blocks of other code, which cannot be deleted"))
        elif number := len(self):
            log.info("going on behind %d entries that an earlier start has written to %s", number, folder)

    def __getitem__(self, name: str) -> Any:
        if self._foreign:
            raise KeyError(name)
        try:
            with self._file(name).open("rb") as file:  # mapped: the system can take pages of what nobody has written into
                content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        except (OSError, ValueError):  # none, or an empty one
            raise KeyError(name) from None
        digest, payload = content[:64], content[64:]
        if hashlib.sha256(payload).hexdigest().encode() != digest:
            raise KeyError(name)
        try:
            return from_bytes(payload)
        except ValueError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        if self._broken:
            return
        try:
            payload = to_bytes(value)
        except TypeError as fault:  # a format of a package of one's own that is no dataclass
            self._give_up(fault)
            return
        temporary = self._file(name).with_suffix(".tmp")
        try:
            with disk_faults_told(self._folder), temporary.open("wb") as file:
                file.write(hashlib.sha256(payload).hexdigest().encode())
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self._file(name))
        except (SharedFault, OSError) as fault:
            temporary.unlink(missing_ok=True)
            self._give_up(fault)

    def __delitem__(self, name: str) -> None:
        try:
            self._file(name).unlink()
        except FileNotFoundError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return (file.stem for file in sorted(self._folder.glob("*.entry")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def close(self) -> None:
        """Throw all of it away."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.entry"

    def _give_up(self, fault: BaseException) -> None:
        self._broken = True
        log.warning("a run that is stopped will have to begin again: %s", fault.args[0])
