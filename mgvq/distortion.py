"""The measured distortion of codes on a Gaussian: `codebook/distortion.json`, by `experiments/distortion/measure.py`."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_FILE = Path(__file__).parent / "codebook" / "distortion.json"


@dataclass(frozen=True, slots=True)
class Measured:
    """Mean squared error on a Gaussian of variance 1, its standard error, and what the code's points are multiplied by there."""

    distortion: float
    error: float
    scales: tuple[float, ...]


def measured(code: str, rate: float) -> Measured:
    """Of `lloyd_max`, `kmeans_<length>`, `lattice` or `trellis_<values>_<state bits>` at so many bits a weight.

    Raises KeyError for what was not measured; an entry is added by the script, never by hand.
    """
    entry = _table()[code][str(float(rate))]
    return Measured(entry["distortion"], entry["error"], tuple(entry["scales"]))


@lru_cache(maxsize=1)
def _table() -> dict[str, dict[str, dict]]:
    return json.loads(_FILE.read_text(encoding="utf-8"))
