"""What a process has freed goes back to the system, and what it does not need at once goes to files."""

import ctypes
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def in_file(tensor: Tensor, folder: Path) -> Tensor:
    """The same numbers in a file of `folder`, mapped into memory; one that is not on the CPU, or empty, stays where it is.

    The system writes such pages back and takes them when others need the room. The file has no name: it is gone with the tensor,
    or with the process. Raises OSError where the disk has no room for it.
    """
    if tensor.device.type != "cpu" or not tensor.numel():
        return tensor
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        # Without the room a write to a page would kill the process.
        _reserve(file.fileno(), tensor.numel() * tensor.element_size())
        mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return mapped.view(tensor.shape).copy_(tensor)


def _reserve(file: int, size: int) -> None:
    if reserve := getattr(os, "posix_fallocate", None):
        reserve(file, 0, size)
    else:  # macOS
        os.pwrite(file, bytes(size), 0)


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
