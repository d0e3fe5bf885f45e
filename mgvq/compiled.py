"""numba with its cache of compiled loops in the user's own folder, and with threads that leave torch's alone.

Modules take `njit` from here, so that both are chosen before numba is imported.
"""

import inspect
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path


def writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, which is made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


# A folder that the user names wins. Where nothing can be written every process compiles for itself: seconds, not an error.
FOLDER = Path(os.environ.setdefault("NUMBA_CACHE_DIR", str(user_cache_path("mgvq", appauthor=False) / "numba")))
CACHED = writable(FOLDER)

# Threads of numba's own: those of OpenMP are torch's too, and numba would set their number for both, to that of the cores. Two
# threads of Python must not start loops at once on these.
LAYER = os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")

import numba  # noqa: E402  (reads both when it is imported)
from numba.core import config  # noqa: E402

config.CACHE_DIR, config.THREADING_LAYER = str(FOLDER), LAYER  # type: ignore[attr-defined]  (had another package imported numba)
prange, get_num_threads = numba.prange, numba.get_num_threads
_REORDER = {"reassoc", "contract", "nsz"}  # infinities and NaN stay what they are


def set_num_threads(number: int) -> None:
    """Compiled loops run on so many threads, or on all that numba has where that is fewer; no result depends on it."""
    numba.set_num_threads(min(number, config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]


def njit(function: Callable | None = None, *, parallel: bool = False, reorder: bool = False) -> Any:
    """Compile a function, or the decorator that does. Without fastmath: every machine computes the same codes.

    `reorder` lets the compiler add in another order and fuse, for vector instructions: for products, on which no code depends.
    """
    if function is None:
        return partial(njit, parallel=parallel, reorder=reorder)
    plain = inspect.unwrap(function)  # as it was written: tests wrap the package's functions to check shapes
    fastmath = _REORDER if reorder else False
    return numba.njit(plain, nogil=True, parallel=parallel, cache=CACHED, error_model="numpy", fastmath=fastmath)
