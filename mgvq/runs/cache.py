"""The cache of calibration statistics: a file for each set of settings that determines them."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mgvq.types import Kronecker, Site, SiteStats, StatsBank


def statistics(folder: Path, key: Mapping[str, Any], collect: Callable[[], StatsBank], sites: Sequence[Site]) -> StatsBank:
    """The statistics of `sites` under `key`: read from `folder`, or collected and written there; the same bits either way.

    `key` is JSON and names everything that can move a number. A file that is torn, or is of other sites, is written anew. Where
    several processes want the same statistics, one collects while the others wait; the kernel drops the lock of one that dies.
    """
    text = json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"
    locks = folder / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / path.stem).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        bank = _read(path, sites)
        if bank is None:
            bank = collect()
            _write(path, text, bank)
        return bank


def _write(path: Path, key: str, bank: StatsBank) -> None:
    """Writes the file completely or not at all. A tensor that several layers hold is stored once, under the name it has first."""
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def pack(name: str, value: Any) -> Any:
        """`value` as JSON, its tensors by their names."""
        if isinstance(value, Tensor):
            if id(value) not in names:
                names[id(value)] = name
                tensors[name] = value.contiguous()
            return {"tensor": names[id(value)]}
        if is_dataclass(value):
            return {f.name: pack(f"{name}.{f.name}", getattr(value, f.name)) for f in fields(value)}
        if isinstance(value, Mapping):
            return {k: pack(f"{name}.{k}", v) for k, v in value.items()}
        return value

    described = {site.name: pack(site.name, stats) for site, stats in bank.items()}
    temporary = path.with_suffix(".tmp")
    # One entry: the library orders several by a hash table, and equal statistics would not be equal files.
    save_file(tensors, temporary, {"mgvq": json.dumps({"key": json.loads(key), "sites": described})})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.rename(path)


def _read(path: Path, sites: Sequence[Site]) -> StatsBank | None:
    """Reads the statistics; None where there is no whole file of these sites."""
    try:
        with safe_open(path, "pt") as file:
            described = json.loads(file.metadata()["mgvq"])["sites"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
        if list(described) != [site.name for site in sites]:
            return None
        return {site: SiteStats(**_unpack(described[site.name], tensors)) for site in sites}
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    unpacked = {k: _unpack(v, tensors) for k, v in value.items()}
    return Kronecker(**unpacked) if "h_in" in unpacked else unpacked
