"""The processes that a run is shared by, as the environment of this one says: `torchrun` sets it."""

import atexit
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from functools import cache
from typing import Any

from mgvq.checks import whole_number
from mgvq.errors import UserError
from mgvq.ranks.ranks import ALONE, Ranks

_SET = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@cache
def _place() -> Mapping[str, str]:
    """What the environment says of this process, which is taken out of it: the libraries that a run uses (lmms-eval) would share
    out work by it that is not shared."""
    return {name: os.environ.pop(name) for name in _SET if name in os.environ}


def several() -> bool:
    """Whether this is one of several processes; asks nobody."""
    return _place().get("WORLD_SIZE", "1") != "1"


def is_first() -> bool:
    """Whether this process is alone, or the first of several; asks nobody."""
    return not several() or _place().get("RANK", "0") == "0"


def local_rank() -> int:
    """The number of this process among those of its machine, by which it takes an accelerator."""
    return int(_place().get("LOCAL_RANK", _place().get("RANK", "0")))


@cache
def ranks() -> Ranks:
    """This process among those of its run: `WORLD_SIZE` of them, met by `RANK`, `MASTER_ADDR` and `MASTER_PORT`.

    Torch is imported where there are several alone. Raises UserError for a WORLD_SIZE or RANK that is no number, and where the
    others cannot be found by what is set.
    """
    if not several():
        return ALONE
    size, rank = (int(word) if word.isdecimal() else word for word in (_place()["WORLD_SIZE"], _place().get("RANK", "")))
    whole_number("WORLD_SIZE", size, least=1)
    if rank == "" or not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(
            f"WORLD_SIZE={size} says that this is one of {size} processes, but RANK, MASTER_ADDR or MASTER_PORT is not set: "
            "start runs of several processes by torchrun, or unset WORLD_SIZE."
        )
    whole_number("RANK", rank, most=int(size) - 1)
    from mgvq.ranks.gloo import Gloo  # here: torch takes seconds to import

    one = Gloo(int(rank), int(size))
    atexit.register(one.leave)
    atexit.register(lambda: [stream.flush() for stream in (sys.stdout, sys.stderr)])  # before that: last come, first called
    return one


class OfTheFirst(MutableMapping[str, Any]):
    """A mapping that the first process has, as all of them see it: the others are told what it holds, and keep nothing.

    All processes ask for the same entries in the same order.
    """

    def __init__(self, ranks: Ranks, own: MutableMapping[str, Any]) -> None:
        self._ranks, self._own = ranks, own

    def __getitem__(self, name: str) -> Any:
        found = self._ranks.first(f"entry {name}", lambda: self._read(name))
        if not found:
            raise KeyError(name)
        return found[0]

    def __setitem__(self, name: str, value: Any) -> None:
        if self._ranks.is_first:
            self._own[name] = value

    def __delitem__(self, name: str) -> None:
        if self._ranks.is_first:
            del self._own[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranks.first("entries", lambda: list(self._own)))

    def _read(self, name: str) -> tuple[Any, ...]:
        """The entry, or nothing."""
        try:
            return (self._own[name],)
        except KeyError:
            return ()

    def __len__(self) -> int:
        return self._ranks.first("number of entries", lambda: len(self._own))
