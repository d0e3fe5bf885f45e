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
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from mgvq.errors import SharedFault
from mgvq.model.blocks import Block, block_name, by_block
from mgvq.model.lazy import Lazy
from mgvq.model.reference import Reference
from mgvq.ranks.ranks import ALONE, Ranks
from mgvq.runs.files import broken_seal, disk_faults_told, open_lock, seal, share, try_lock
from mgvq.types import Kronecker, Site, SiteStats, StatsBank

log = logging.getLogger(__name__)
_MOST_STATES = 2**30  # bytes of states that are kept: those of a long evaluation of a wide model would fill disks


def statistics(
    folder: Path, key: Mapping[str, Any], collect: Callable[[], StatsBank], sites: Sequence[Site], ranks: Ranks = ALONE
) -> StatsBank:
    """The statistics of `sites` under `key`: read from `folder`, or collected and written there; the same bits either way.

    `key` is JSON and names everything that can move a number. Of several processes that want the same file one collects while the
    others wait; the kernel drops the lock of one that dies. A file that is not what was written, by the digest beside it, is set
    aside as `.bad` and collected again. Nothing of the cache ends a run: where it cannot be written, a warning says so.

    Of the processes of one run (`ranks`) the first locks, reads and writes, and tells the others what it has read.
    """
    text, path = _place(folder, key)
    lock = _opened(folder / ".locks" / path.stem) if ranks.is_first else None
    with closing(lock) if lock else nullcontext():
        if lock:
            _wait_for(lock)
        bank = ranks.first("cached statistics", lambda: _read(path, sites))
        if bank is None:
            bank = collect()
            if lock:
                _keep(path, "the statistics", *_packed(text, bank))
        return bank


def _opened(lock: Path) -> IO[bytes] | None:
    try:
        return open_lock(lock)
    except SharedFault as fault:
        log.warning("the statistics cannot be kept for other runs: %s", fault.args[0])
        return None


def statistics_by_block(
    folder: Path,
    key: Mapping[str, Any],
    collect: Callable[[Callable[[Block], bool], Path], Iterator[tuple[Block, StatsBank]]],
    sites: Sequence[Site],
    ranks: Ranks = ALONE,
) -> StatsBank:
    """The same for statistics that are not in memory together: a file a block in a folder of `folder`, whose tensors are read
    when a stage asks for those of a layer.

    `collect` is asked for the blocks that are not finished, with a folder for what it puts aside meanwhile, and what it gives is
    written at once, so that a run which is stopped goes on behind the last one. What a run with all statistics in memory has left
    is read instead where it is there. Raises SharedFault where the files cannot be written: there is no other place for them.

    Of the processes of one run (`ranks`) the first locks and writes, and all read the files, whose folder they share.
    """
    text, path = _place(folder, key)
    files = {block_name(block): path.with_suffix("") / f"block-{n:04}.safetensors" for n, block in enumerate(by_block(sites))}
    with closing(open_lock(folder / ".locks" / path.stem)) if ranks.is_first else nullcontext() as lock:
        if lock:
            _wait_for(lock)
        bank = _mapped(path, sites) if lock and path.is_file() else None
        if ranks.first("whether there is one file", lambda: bank is not None):
            bank = _mapped(path, sites) if bank is None else bank
            assert bank is not None, f"{path} is not what the first process has read: the processes need the same folder"
            return bank
        found = {block_name(block): _mapped(files[block_name(block)], block) if lock else None for block in by_block(sites)}
        finished = ranks.first("finished blocks", lambda: {name for name, bank in found.items() if bank is not None})
        missing, place = len(finished) < len(files), path.with_suffix("")
        if lock and missing:
            place.mkdir(exist_ok=True)
        with disk_faults_told(place):  # what is put aside meanwhile can fill a disk too
            for block, bank in collect(lambda block: block_name(block) in finished, place) if missing else ():
                if lock:
                    _write(files[block_name(block)], *_packed(text, bank, leave_out_zeros=True))
                del bank  # while the next one is made
        ranks.first("written blocks", lambda: None)
    for block in by_block(sites):
        if found[block_name(block)] is None:
            found[block_name(block)] = _mapped(files[block_name(block)], block)
    whole = {site: bank for bank in found.values() if bank is not None for site in bank}
    return Lazy(sites, lambda site: whole[site][site])


def _wait_for(lock: IO[bytes]) -> None:
    try:
        try_lock(lock, wait=True)
    except SharedFault as fault:
        log.warning("two runs at once may collect the same statistics: %s", fault.args[0])


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
    """Writes the file completely or not at all; where it cannot be written, a warning says so."""
    try:
        _write(path, tensors, described)
    except (SharedFault, OSError) as fault:
        log.warning("%s are not kept for other runs: %s", what, fault.args[0])


def _write(path: Path, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> None:
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
    except (SharedFault, OSError):
        temporary.unlink(missing_ok=True)
        raise


def _packed(key: str, bank: StatsBank, *, leave_out_zeros: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of statistics by name, and all else. A tensor that several layers hold is there once, under its first name.

    With `leave_out_zeros` tensors of zeros alone (of a modality that the data does not have, say) are there as their shapes.
    """
    packing = _Packing(leave_out_zeros)
    described = {site.name: packing.packed(site.name, stats) for site, stats in bank.items()}
    return packing.tensors, {"key": json.loads(key), "sites": described}


class _Packing:
    """Tensors by name. No function inside of `_packed`: one that calls itself would keep all of them until the next collection
    of garbage, which a few large things do not bring about."""

    def __init__(self, leave_out_zeros: bool) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._leave_out_zeros = leave_out_zeros

    def packed(self, name: str, value: Any) -> Any:
        """`value` as JSON, its tensors by their names."""
        if isinstance(value, Tensor):
            if self._leave_out_zeros and id(value) not in self._names and not value.any():
                return {"zeros": list(value.shape)}
            if id(value) not in self._names:
                self._names[id(value)] = name
                self.tensors[name] = value.contiguous()
            return {"tensor": self._names[id(value)]}
        if is_dataclass(value):
            return {f.name: self.packed(f"{name}.{f.name}", getattr(value, f.name)) for f in fields(value)}
        if isinstance(value, Mapping):
            return {k: self.packed(f"{name}.{k}", v) for k, v in value.items()}
        return value


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


def _mapped(path: Path, sites: Sequence[Site]) -> StatsBank | None:
    """The statistics of a file as `_read` gives them, but for that a layer's are read, by mapping the file, when they are asked
    for."""
    if not path.is_file() or (why := broken_seal(path)) is not None:
        if path.is_file():
            log.warning("%s %s: it is collected again", path, why)
        return None
    file = safe_open(path, "pt")
    described = json.loads(file.metadata()["mgvq"])["sites"]
    if list(described) != [site.name for site in sites]:
        return None
    return Lazy(sites, lambda site: SiteStats(**_unpack(described[site.name], Lazy(file.keys(), file.get_tensor))))


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "zeros" in value:
        return torch.zeros(value["zeros"])
    unpacked = {k: _unpack(v, tensors) for k, v in value.items()}
    return Kronecker(**unpacked) if "h_in" in unpacked else unpacked
