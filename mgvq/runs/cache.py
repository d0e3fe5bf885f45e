"""What runs share: calibration statistics, and what the full-precision model says in an evaluation; a file for each set of
settings that determines them."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from mgvq.errors import SharedFault
from mgvq.model.reference import Reference
from mgvq.runs.files import broken_seal, disk_faults_told, open_lock, seal, share, try_lock
from mgvq.types import Kronecker, Site, SiteStats, StatsBank

log = logging.getLogger(__name__)
_MOST_STATES = 2**30  # bytes of states that are kept: those of a long evaluation of a wide model would fill disks


def statistics(folder: Path, key: Mapping[str, Any], collect: Callable[[], StatsBank], sites: Sequence[Site]) -> StatsBank:
    """The statistics of `sites` under `key`: read from `folder`, or collected and written there; the same bits either way.

    `key` is JSON and names everything that can move a number. Of several processes that want the same file one collects while the
    others wait; the kernel drops the lock of one that dies. A file that is not what was written, by the digest beside it, is set
    aside as `.bad` and collected again. Nothing of the cache ends a run: where it cannot be written, a warning says so.
    """
    text, path = _place(folder, key)
    try:
        lock = open_lock(folder / ".locks" / path.stem)
    except SharedFault as fault:
        log.warning("the statistics cannot be kept for other runs: %s", fault.args[0])
        lock = None
    with closing(lock) if lock else nullcontext():
        if lock:
            try:
                try_lock(lock, wait=True)
            except SharedFault as fault:
                log.warning("two runs at once may collect the same statistics: %s", fault.args[0])
        bank = _read(path, sites)
        if bank is None:
            bank = collect()
            if lock:
                _keep(path, "the statistics", *_packed(text, bank))
        return bank


@contextmanager
def reference(folder: Path, key: Mapping[str, Any], model: PreTrainedModel) -> Iterator[Reference]:
    """`model` as an evaluation asks it, with the states that other runs of `key` have left in `folder`; new ones are left there.

    A file that is not what was written is not read. Nothing of the cache ends a run, as with `statistics`.
    """
    text, path = _place(folder, key)
    kept: dict[str, Tensor] = {}
    if path.is_file() and broken_seal(path) is None:
        with contextlib.suppress(SafetensorError, OSError):
            kept = load_file(path)
    asked = Reference(model, dict(kept))
    yield asked
    if asked.kept.keys() == kept.keys() or sum(states.nbytes for states in asked.kept.values()) > _MOST_STATES:
        return
    try:
        with closing(open_lock(folder / ".locks" / path.stem)) as lock:
            if try_lock(lock):  # else another run writes the same
                _keep(path, "the states of the full-precision model", asked.kept, {"key": json.loads(text)})
    except SharedFault as fault:
        log.warning("the states of the full-precision model are not kept for other runs: %s", fault.args[0])


def _place(folder: Path, key: Mapping[str, Any]) -> tuple[str, Path]:
    """The key as text, and the file that bears its digest."""
    text = json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text, folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"


def _keep(path: Path, what: str, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> None:
    """Writes the file completely or not at all."""
    temporary = path.with_suffix(".tmp")
    try:
        with disk_faults_told(path.parent):
            # One entry: the library orders several by a hash table, and equal statistics would not be equal files.
            save_file(dict(tensors), temporary, {"mgvq": json.dumps(described)})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            share(temporary)
            seal(temporary, path)
            temporary.rename(path)
    except (SharedFault, OSError) as fault:
        temporary.unlink(missing_ok=True)
        log.warning("%s are not kept for other runs: %s", what, fault.args[0])


def _packed(key: str, bank: StatsBank) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of statistics by name, and all else. A tensor that several layers hold is there once, under its first name."""
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
    return tensors, {"key": json.loads(key), "sites": described}


def _read(path: Path, sites: Sequence[Site]) -> StatsBank | None:
    """None where there is no file, or none of these sites that is what was written: that is set aside."""
    if not path.is_file():
        return None
    if (why := broken_seal(path)) is None:
        try:
            with safe_open(path, "pt") as file:
                described = json.loads(file.metadata()["mgvq"])["sites"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
            if list(described) == [site.name for site in sites]:
                return {site: SiteStats(**_unpack(described[site.name], tensors)) for site in sites}
            why = "is of other layers"
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            why = f"cannot be read ({error})"
    log.warning("%s %s: it is set aside as .bad, and collected again", path, why)
    with contextlib.suppress(OSError):  # where nothing can be written it stays, and is not read
        path.rename(path.with_suffix(".bad"))
    return None


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    unpacked = {k: _unpack(v, tensors) for k, v in value.items()}
    return Kronecker(**unpacked) if "h_in" in unpacked else unpacked
