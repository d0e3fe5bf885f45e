"""Codes out of the bytes that `mgvq.formats.packing.pack` has written, one at a time."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from mgvq.compiled import njit


def padded(packed: UInt8[Tensor, "bytes"]) -> NDArray[np.uint8]:
    """The bytes themselves, filled up with zeros to the eight that are read at once where there are less."""
    return torch.nn.functional.pad(packed, (0, max(0, 8 - len(packed)))).numpy() if len(packed) < 8 else packed.numpy()


def entries(packed: UInt8[Tensor, "bytes"], width: int, count: int, table: Float[Tensor, "k"]) -> Float[Tensor, "count"]:
    """The entry of the table that each of `count` packed codes names."""
    named = np.empty(count, np.float32)
    _entries(padded(packed), width, table.float().contiguous().numpy(), named)
    return torch.from_numpy(named)


@njit
def _entries(packed, width, table, named):
    for i in range(len(named)):
        named[i] = table[code_at(packed, i, width)]


@njit
def code_at(packed, index, width):
    """The code number `index` of those of `width` bits (57 at most): its bits lie in the eight bytes from its first one on."""
    bit = index * width
    first = min(bit >> 3, len(packed) - 8)
    return (word(packed, first) >> np.uint64(bit - 8 * first)) & np.uint64((1 << width) - 1)


@njit
def word(packed, first):
    """Eight bytes as one number, the first byte lowest; the compiler makes one load of it."""
    at = np.uint64(first)
    number = np.uint64(packed[at])
    for i in range(1, 8):
        number |= np.uint64(packed[at + np.uint64(i)]) << np.uint64(8 * i)
    return number
