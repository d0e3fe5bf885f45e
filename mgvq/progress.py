"""How far a loop is: a bar on a terminal, and nothing where the output goes into a file or a pipe."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], what: str) -> Iterator[T]:
    """`items` one by one; the bar bears the name of what they are, and is gone when they are through."""
    return iter(tqdm(items, what, leave=False, disable=None))  # None: shown on a terminal only
