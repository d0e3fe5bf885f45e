"""Mappings whose values are made when they are asked for, so that those of a whole model need not be in memory at once."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Lazy(Mapping[K, V]):
    """`{key: make(key) for key in keys}`, of which nothing is made before it is read.

    Without `together` a value is made anew whenever it is read. With it the values of the keys for which `together` gives the
    same are kept until a key is read for which it gives something else: those of one block of the model, say.
    """

    def __init__(self, keys: Iterable[K], make: Callable[[K], V], together: Callable[[K], object] | None = None) -> None:
        self._keys, self._make, self._together = dict.fromkeys(keys), make, together
        self._kept: dict[K, V] = {}

    def __getitem__(self, key: K) -> V:
        if key not in self._keys:
            raise KeyError(key)
        if self._together is None:
            return self._make(key)
        if key not in self._kept:
            if self._kept and self._together(next(iter(self._kept))) != self._together(key):
                self._kept.clear()  # before the next value is made: the two need not fit into memory together
            self._kept[key] = self._make(key)
        return self._kept[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class Overlaid(Mapping[K, V]):
    """`{**under, **over}` without reading a value of either."""

    def __init__(self, under: Mapping[K, V], over: Mapping[K, V]) -> None:
        self._under, self._over = under, over

    def __getitem__(self, key: K) -> V:
        return self._over[key] if key in self._over else self._under[key]

    def __iter__(self) -> Iterator[K]:
        return iter(dict.fromkeys([*self._under, *self._over]))

    def __len__(self) -> int:
        return len({*self._under, *self._over})
