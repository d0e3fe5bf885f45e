"""What a process has freed goes back to the system."""

import ctypes
import sys


def give_back() -> None:
    """Have the C library return its free pages, where it is glibc; nothing elsewhere.

    glibc keeps what is freed in pieces of less than 32 MB for as long as a piece behind it is in use, and the tensors of wide
    layers are that large: half a gigabyte of one stage would stand beside what the next one needs.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
