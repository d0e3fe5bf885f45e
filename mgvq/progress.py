"""How far a loop is, how long it will take, and the most memory so far: a bar on a terminal, a line now and then in a log."""

import logging
import os
import re
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from operator import length_hint
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
_UNKNOWN = -1

log = logging.getLogger(__name__)
_EVERY = 20.0  # seconds between two lines of a log, and before the first
_LINE = re.compile(r"so far (\d+) of (\d+) (.*?), about ([\d.]+) min left, peak memory ([\d.]+) GB")
_going_on: list[str] = []  # the loops in which a loop runs: the outermost alone is told of in a log
_told_at = 0.0


def progress(items: Iterable[T], what: str) -> Iterator[T]:
    """`items` one by one, `what` being what they are.

    A terminal shows a bar, which is gone when they are through. Anywhere else the outermost loop of known length (`Counted` for
    what is made item by item) says every 20 seconds which item of how many it is at, how many minutes are left at this pace, and
    the peak memory of the process.
    """
    if sys.stderr.isatty() and "TQDM_DISABLE" not in os.environ:
        return _shown(items, what)
    return _told(items, what)


def _shown(items: Iterable[T], what: str) -> Iterator[T]:
    with tqdm(items, what, leave=False, total=_number(items)) as bar:
        for item in bar:
            bar.set_postfix_str(f"peak {peak_gb():.2f} GB", refresh=False)
            yield item


def _told(items: Iterable[T], what: str) -> Iterator[T]:
    global _told_at
    number = _number(items)
    start = time.monotonic()
    if not _going_on:
        _told_at = start
    _going_on.append(what)
    try:
        for done, item in enumerate(items):
            now = time.monotonic()
            if number and done and len(_going_on) == 1 and now - _told_at >= _EVERY:
                left = (now - start) / done * (number - done) / 60
                log.info("so far %d of %d %s, about %.1f min left, peak memory %.2f GB", done, number, what, left, peak_gb())
                _told_at = now
            yield item
    finally:
        _going_on.remove(what)


def _number(items: Iterable[object]) -> int | None:
    """How many there are, where that is known."""
    number = length_hint(items, _UNKNOWN)
    return None if number == _UNKNOWN else number


class Counted(Iterator[T]):
    """An iterator that knows how many items it has at first, so that `progress` can say how far it is."""

    def __init__(self, items: Iterable[T], number: int | None) -> None:
        """`number`: None: it is not known."""
        self._items, self._number = iter(items), number

    def __next__(self) -> T:
        return next(self._items)

    def __length_hint__(self) -> int:
        return NotImplemented if self._number is None else self._number


def chained(*parts: Iterable[T]) -> Counted[T]:
    """The items of one part after the other; how many is known where it is of every part."""
    numbers = [_number(part) for part in parts]
    known = [number for number in numbers if number is not None]
    return Counted(chain(*parts), sum(known) if len(known) == len(numbers) else None)


@dataclass(frozen=True)
class Progress:
    """What a line of a log says."""

    done: int
    total: int
    what: str
    minutes_left: float
    peak_gb: float

    def __str__(self) -> str:
        return f"{self.done} of {self.total} {self.what}, about {self.minutes_left:.1f} min left, peak {self.peak_gb:.2f} GB"


def last_told(text: str) -> Progress | None:
    """The last that a run's log says of its progress; None where it has not said anything yet."""
    found = _LINE.findall(text)
    if not found:
        return None
    done, total, what, left, peak = found[-1]
    return Progress(int(done), int(total), what, float(left), float(peak))


def peak_gb() -> float:
    """The most memory that the accelerator has held, or the process where none is in use, in 10^9 bytes."""
    torch = sys.modules.get("torch")  # never imported for this
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
