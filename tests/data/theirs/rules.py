"""What counts in the identity of a run; planning imports this module, and not those of the variants."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def spelled(file: str, fields: Mapping[str, Any]) -> str:
    """What counts of a calibration's file: its name in small letters."""
    return Path(file).name.lower()
