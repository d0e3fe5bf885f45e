"""Compiled loops on as many threads as torch has.

They are threads of Python: compiled loops let go of its lock. Those of numba may not be started by two threads of a program at
once, as a server that answers two people would.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch

_LEAST = 1 << 18  # codes below which a second thread costs more than it brings


def share_out(part: Callable[..., None], count: int, work: int, *arguments: Any) -> None:
    """Call `part(first, last, *arguments)` for runs of the numbers below `count`, one a thread, which write to other places.

    `work`: about how many codes are read in all. What is computed does not depend on the number of threads.
    """
    workers = max(1, min(torch.get_num_threads(), count, work // _LEAST))
    bounds = [count * w // workers for w in range(workers + 1)]
    rest = [_threads(os.getpid(), workers - 1).submit(part, *bounds[w : w + 2], *arguments) for w in range(1, workers)]
    part(*bounds[:2], *arguments)
    for future in rest:
        future.result()


@lru_cache(maxsize=8)
def _threads(process: int, number: int) -> ThreadPoolExecutor:  # a forked process has none of its parent's threads
    return ThreadPoolExecutor(number, thread_name_prefix="mgvq-kernel")
