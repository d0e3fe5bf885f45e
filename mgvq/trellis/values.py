"""The weights that a state stands for, computed from its number: nothing is stored, and every machine has the same.

All are of mean 0 and variance 1 over the states.
"""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

from mgvq.trellis.code import TrellisCode

_CONGRUENCES = ((34038481, 76625530), (264435761, 1013904223))  # QTIP's 1MAD, and a second one for a step's second weight
_ROOTS = {1: 1.618033988749895, 2: 1.324717957244746}  # of x^(V+1) = x + 1
_TABLE_BITS = 10  # of the Gaussian quantiles: finer ones gain nothing
_GRID = 2**12  # a quantile is a multiple of 1 / _GRID: the last digit of a machine's logarithm is rounded away


def state_values(code: TrellisCode) -> Float[Tensor, "states v"]:
    """float32, exact for every device."""
    return torch.from_numpy(_state_values(code).copy())


@lru_cache(maxsize=64)
def _state_values(code: TrellisCode) -> NDArray[np.float32]:
    one = computed if code.values == "computed" else hybrid
    return np.stack([one(code, i) for i in range(code.step_weights)], axis=1).astype(np.float32)


def computed(code: TrellisCode, weight: int) -> NDArray[np.float64]:
    """The sum of the four bytes of `a s + b mod 2^32`: nearly Gaussian (QTIP, "1MAD"), here less its mean."""
    factor, shift = _CONGRUENCES[weight]
    word = np.arange(1 << code.state_bits, dtype=np.uint64) * np.uint64(factor) + np.uint64(shift)
    total = np.stack([word >> np.uint64(8 * i) & np.uint64(255) for i in range(4)]).astype(np.int64).sum(0)
    count = len(total)
    square = count * int((total**2).sum()) - int(total.sum()) ** 2  # whole numbers: the same on every machine
    return (count * total - int(total.sum())) / np.sqrt(float(square))


def hybrid(code: TrellisCode, weight: int) -> NDArray[np.float64]:
    """One of 2^L Gaussian quantiles a state, from a table of at most 1,024.

    A random order wastes distortion where a walk has few branches to choose from. So the 2^B branches that leave a state take
    one quantile in each 2^B-th of all, equally far apart, as in Ungerboeck's set partition. Which of these sets a state has
    follows the low-discrepancy sequence R_V (Roberts 2018: multiples of the inverse powers of the root of x^(V+1) = x + 1, for
    V = 1 the golden ratio); the exclusive or with a state's oldest bits spreads those that meet. 256 such states do what 1,024
    random ones do.
    """
    state = np.arange(1 << code.state_bits)
    branches, origins = 1 << code.step_bits, 1 << (code.state_bits - code.step_bits)
    branch = (state ^ state // origins) % branches
    stride = int(origins * _ROOTS[code.step_weights] ** -(weight + 1)) | 1
    index = (branch * 3**weight * origins + state // branches * stride) % len(state)  # odd factors: every quantile once
    return quantiles(min(code.state_bits, _TABLE_BITS))[index >> max(0, code.state_bits - _TABLE_BITS)]


def quantiles(bits: int) -> NDArray[np.float64]:
    """2^bits quantiles of a Gaussian at the middles of equal shares, scaled to variance 1."""
    exact = ndtri((np.arange(1 << bits) + 0.5) / (1 << bits))
    return np.round(exact / np.sqrt(np.mean(exact**2)) * _GRID) / _GRID
