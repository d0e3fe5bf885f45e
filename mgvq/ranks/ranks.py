"""What the stages of a run ask of the processes that share it; here answered for one process alone."""

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
K = TypeVar("K")


class Ranks:
    """The processes of a run, as seen from one of them: its number `rank` of `size`. This class is one process, which shares
    nothing; `mgvq.ranks.gloo.Gloo` is one of several.

    All processes go through the same code, with the same settings, and come to the same calls in the same order; `what` names a
    call, so that processes that have gone different ways are told apart instead of waiting for each other. Whatever decides
    where the code goes (losses on held-out samples, say) is therefore made of what all of them have found, in the order of their
    numbers, and has the same bits in each.
    """

    rank, size = 0, 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that locks, writes and reports."""
        return self.rank == 0

    def share(self, items: Iterable[T]) -> Iterable[T]:
        """The items that are this process's own: of n items those from `n rank / size` on, so that the shares of all processes
        one after the other are the whole. One process gets what it gave, an iterator for an iterator."""
        if self.size == 1:
            return items
        whole = list(items)
        return whole[len(whole) * self.rank // self.size : len(whole) * (self.rank + 1) // self.size]

    def deal(self, costs: Sequence[int]) -> list[int]:
        """The process of each of several tasks: the dearest first, each to whoever has least so far, of equal ones the first.

        That is within a third of the best there is (Graham 1969), and equal for equal costs, wherever it is asked for.
        """
        loads, whose = [0] * self.size, [0] * len(costs)
        for task in sorted(range(len(costs)), key=lambda number: -costs[number]):
            whose[task] = loads.index(min(loads))
            loads[whose[task]] += costs[task]
        return whose

    def first(self, what: str, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; the others call nothing."""
        return make()

    def gather(self, what: str, value: T) -> list[T]:
        """The values of all processes, in their order."""
        return [value]

    def total(self, what: str, sums: MutableMapping[K, Any]) -> dict[K, Any]:
        """The sums over all processes of the tensors of each key, added up in the order of the processes; a process that lacks a
        key adds nothing. `sums` is empty afterwards, so that no sum is held twice.

        Sums over samples that were cut into the shares of several processes are added up in another order than those of one
        process: in float64 they may differ in the last bit, which is the 29th behind those of the float32 that they are rounded
        to. Sums of float32 numbers whose exponents lie within 29 bits of each other have no rounding at all. So one and several
        processes give equal statistics in practice, though nothing forces it; tests compare the checkpoints.
        """
        found = dict(sums)
        sums.clear()
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error inside, in any of the processes, ends all of them with its message."""
        yield

    def leave(self) -> None:
        """Called last of all: nobody goes before the first process has said what there is to say."""


ALONE = Ranks()
