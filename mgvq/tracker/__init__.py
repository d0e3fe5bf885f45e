"""Trackers: mirrors of finished runs. The run folder is the truth; losing a tracker loses nothing."""

from pathlib import Path
from typing import Protocol, runtime_checkable


@runtime_checkable
class Tracker(Protocol):  # here and not in protocols.py: planning imports it, and protocols.py imports torch
    """Mirrors a finished run, of which it reads the folder, somewhere else. `place` names where, in one line.

    Told again of the same run, after a kill, it leaves the place as after the first time.
    """

    @property
    def place(self) -> str: ...
    def __call__(self, run: Path) -> None: ...
