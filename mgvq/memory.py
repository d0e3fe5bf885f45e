"""What a process has freed goes back to the system."""

import ctypes
import sys
from typing import Any

_M_MMAP_THRESHOLD = -3  # in malloc.h
_LARGE = 2**18  # bytes


def give_back() -> None:
    """Have the C library return its free pages, where it is glibc; nothing elsewhere.

    glibc keeps what is freed in pieces of less than 32 MB for as long as a piece behind it is in use, and the tensors of wide
    layers are that large: half a gigabyte of one stage would stand beside what the next one needs.
    """
    if trim := _of_glibc("malloc_trim"):
        trim(0)


def map_large() -> None:
    """Have every piece of 256 kB and more be pages of its own from here on, which go back when it is freed; glibc alone.

    By itself it raises that size to 32 MB as such pieces are freed: a process that goes through many blocks then holds twice of
    what it uses. Fresh pages cost a hundredth of the time that it takes to fill them.
    """
    if set_option := _of_glibc("mallopt"):
        set_option(_M_MMAP_THRESHOLD, _LARGE)


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
