"""Exact nearest points of the lattice codes."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.compiled import get_num_threads, njit, prange
from mgvq.lattice.points import DIMENSION, SHIFT, absolute_values, shortest

_LANES = 64  # vectors side by side, so that loops over them are vector instructions
_CHUNK = 1 << 15


def nearest_e8p(vectors: Float[Tensor, "n 8"]) -> Int[Tensor, "n"]:
    """The code, int32, of the nearest of the 65,536 points; of equals one, the same on every machine.

    On the CPU, with numba's threads. In each half of the code (either shift) and for each vector of absolute values the best
    signs are the target's own; where their parity is wrong, the one that costs least is turned. Raises ValueError for non-finite
    vectors.
    """
    source = _checked(vectors).cpu().contiguous().numpy()
    magnitudes = absolute_values()
    parity = magnitudes.sum(1).astype(np.int64) % 2
    codes = np.empty(len(source), np.int32)
    _search(source, magnitudes, (magnitudes**2).sum(1), parity, get_num_threads(), codes)
    return torch.from_numpy(codes).to(vectors.device)


def nearest_e8(vectors: Float[Tensor, "n 8"]) -> Int[Tensor, "n"]:
    """The code, int32, of the nearest of the 256 points of the 1-bit code. Raises ValueError for non-finite vectors."""
    points = torch.from_numpy(shortest()).to(vectors.device)
    half_norms = points.square().sum(1) / 2
    chunks = _checked(vectors).split(_CHUNK)
    return torch.cat([(chunk @ points.T - half_norms).argmax(1) for chunk in chunks]).int()


def _checked(vectors: Tensor) -> Tensor:
    if not torch.isfinite(vectors).all():
        raise ValueError("a lattice needs finite vectors")
    return vectors.detach().float()


@njit(parallel=True)
def _search(vectors, magnitudes, norms, parity, workers, codes):
    for worker in prange(workers):
        _search_part(vectors, magnitudes, norms, parity, worker, workers, codes)


@njit
def _search_part(vectors, magnitudes, norms, parity, worker, workers, codes):
    """Every `workers`-th group of vectors."""
    size = np.empty((DIMENSION, _LANES), np.float32)
    square = np.empty(_LANES, np.float32)
    turned = np.empty((2, _LANES), np.float32)  # 4 where this parity of negative signs is not the target's own, else 0
    least = np.empty(_LANES, np.float32)
    best = np.empty(_LANES, np.int32)
    for first in range(worker * _LANES, len(vectors), workers * _LANES):
        lanes = min(_LANES, len(vectors) - first)
        for lane in range(_LANES):
            least[lane] = np.inf
        for half in range(2):
            for lane in range(_LANES):
                negative = 0
                square[lane] = 0
                for i in range(DIMENSION):
                    x = vectors[first + min(lane, lanes - 1), i] - np.float32(SHIFT * (1 - 2 * half))  # the last repeats
                    size[i, lane] = abs(x)
                    square[lane] += x * x
                    negative += x < 0
                turned[negative % 2, lane] = 0
                turned[1 - negative % 2, lane] = 4
            for k in range(len(magnitudes)):
                _compare(size, magnitudes[k], norms[k], square, turned[parity[k]], np.int32(2 * k + half), least, best)
        for lane in range(lanes):
            index, half = best[lane] // 2, best[lane] % 2
            codes[first + lane] = (index << 8) + _signs(vectors[first + lane], magnitudes[index], parity[index], half) + half


@njit
def _compare(size, magnitude, norm, square, turned, candidate, least, best):
    """`|x|^2 - 2 |x|.a + |a|^2`, and 4 times the least term of the product where a sign has to be turned."""
    for lane in range(size.shape[1]):
        product, cheapest = np.float32(0), np.float32(np.inf)
        for i in range(DIMENSION):
            term = size[i, lane] * magnitude[i]
            product += term
            cheapest = term if term < cheapest else cheapest
        error = square[lane] + norm - np.float32(2) * product + turned[lane] * cheapest
        closer = error < least[lane]
        least[lane] = error if closer else least[lane]
        best[lane] = candidate if closer else best[lane]


@njit
def _signs(vector, magnitude, parity, half):
    """The target's own signs but for the cheapest, where their parity is wrong; the bits of the first seven."""
    negative, cheapest, bits = 0, 0, 0
    for i in range(DIMENSION):
        x = vector[i] - np.float32(SHIFT * (1 - 2 * half))
        negative += x < 0
        bits += (x < 0) << (i + 1)
        there = vector[cheapest] - np.float32(SHIFT * (1 - 2 * half))
        if abs(x) * magnitude[i] < abs(there) * magnitude[cheapest]:
            cheapest = i
    if negative % 2 != parity:
        bits ^= 1 << (cheapest + 1)
    return bits & 254
