"""Exact search for the nearest centroid: the same code from any number of threads, chunks or processes.

Vectors and centroids are rounded to a grid of a power of two, so that every product and partial sum of the scores is a whole
number below 2^53: a sum of products in float64 is exact then, in whatever order it adds. The centroid's index sits in the lowest
bits of its score; the least score is score and code at once, and of equal scores the lowest index wins.
"""

import math
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.compiled import get_num_threads, njit, prange

_HEADROOM = 3  # bits: vectors may reach 2^3 times the largest centroid, what lies farther out is brought back to that
_METRIC_BITS = 24
_WEIGHT_BITS = 13  # the squares of centroids have the other bits of a product
_CHUNK = 1 << 15  # scores at a time: what a core's cache holds
_BLOCK = 1 << 16  # vectors on the grid at a time
_LANES = 64  # vectors side by side, so that loops over them are vector instructions
_MOST = 4  # terms of a score up to which a compiled loop does the search, where a product would write all scores down
_SHARED = 1 << 18  # scores that are worth a second thread
_NONE = np.empty((0, 0), np.float32)  # weights


class Nearest:
    """Finds the index of the nearest of `centroids`."""

    def __init__(self, centroids: Float[Tensor, "k d"]) -> None:
        num, length = centroids.shape
        self.index_bits = max(1, (num - 1).bit_length())
        self.bits = (51 - self.index_bits - _HEADROOM - (length - 1).bit_length()) // 2
        self.table, self.step = _whole(centroids, self.bits)
        self.index = torch.arange(num, dtype=torch.float64, device=centroids.device)

    def __call__(
        self,
        vectors: Float[Tensor, "n d"],
        weight: Float[Tensor, "n d"] | None = None,
        metric: Float[Tensor, "d d"] | None = None,
    ) -> Int[Tensor, "n"]:
        """The c with the least `|x - c|^2`, `sum_j weight_j (x_j - c_j)^2`, or `(x - c)^T metric (x - c)` (metric symmetric).

        Coordinates carry 16 bits or more, relative to the largest centroid, and weights 13, relative to the largest of a vector;
        within that the answer is exact. A vector without any weight gets code 0. `weight` and `metric` exclude each other.
        """
        terms = vectors.shape[1] if weight is None else 2 * vectors.shape[1]
        if terms <= _MOST and vectors.device.type == "cpu":
            return self._by_loop(vectors, weight, metric)
        right, bias = self._centroids(metric) if weight is None else self._weighted_centroids()
        rows = max(1, _CHUNK // len(bias))
        best = []
        for start in range(0, len(vectors), _BLOCK):
            block = slice(start, start + _BLOCK)
            left = self._vectors(vectors[block]) if weight is None else self._weighted_vectors(vectors[block], weight[block])
            best += [torch.addmm(bias, part, right).amin(1) for part in left.split(rows)]
        return torch.cat(best).long() & ((1 << self.index_bits) - 1)

    def _by_loop(
        self, vectors: Float[Tensor, "n d"], weight: Float[Tensor, "n d"] | None, metric: Float[Tensor, "d d"] | None
    ) -> Int[Tensor, "n"]:
        """The same codes, in one call for the thousands of small searches of LDLQ."""
        if metric is not None:
            right, bias = _turned(self.table.numpy(), metric.numpy(), self.bits, self.index_bits)
        else:
            right, bias = self._plain if weight is None else self._weighted
        codes = np.empty(len(vectors), np.int64)
        weights = _NONE if weight is None else weight.contiguous().numpy()
        grid = 1 / self.step, 2.0 ** (self.bits + _HEADROOM), (1 << self.index_bits) - 1
        given = vectors.contiguous().numpy(), weights, *grid, right, bias
        if (workers := get_num_threads()) > 1 and len(codes) * len(bias) >= _SHARED:
            _search(*given, workers, codes)
        else:
            _search_part(*given, 0, 1, codes)
        return torch.from_numpy(codes)

    @cached_property
    def _plain(self) -> tuple[np.ndarray, np.ndarray]:
        right, bias = self._centroids(None)
        return right.contiguous().numpy(), bias.numpy()

    @cached_property
    def _weighted(self) -> tuple[np.ndarray, np.ndarray]:
        right, bias = self._weighted_centroids()
        return right.contiguous().numpy(), bias.numpy()

    def _centroids(self, metric: Float[Tensor, "d d"] | None) -> tuple[Float[Tensor, "d k"], Float[Tensor, "k"]]:
        """`c.Mc - 2 x.Mc`: what x is multiplied with, and what is added."""
        turned = self.table if metric is None else _whole(self.table @ _whole(metric, _METRIC_BITS)[0], self.bits)[0]
        bias = (self.table * turned).sum(1).mul_(2.0**self.index_bits).add_(self.index)
        return turned.T * -(2.0 ** (self.index_bits + 1)), bias

    def _vectors(self, vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        limit = 2.0 ** (self.bits + _HEADROOM)
        return (vectors.double() * (1 / self.step)).round_().clamp_(-limit, limit)

    def _weighted_centroids(self) -> tuple[Float[Tensor, "two_d k"], Float[Tensor, "k"]]:
        """`w.c^2 - 2 wx.c`: what (-2 wx, w) is multiplied with, and what is added."""
        squares = (self.table * self.table * 2.0**-_WEIGHT_BITS).round_()
        return torch.cat([self.table, squares], 1).T * 2.0**self.index_bits, self.index

    def _weighted_vectors(self, vectors: Float[Tensor, "n d"], weight: Float[Tensor, "n d"]) -> Float[Tensor, "n two_d"]:
        """(-2 wx, w), each vector's weights relative to its largest, which leaves its nearest centroid as it is."""
        largest = weight.double().amax(1, keepdim=True)
        relative = (weight * (2.0**_WEIGHT_BITS / torch.where(largest > 0, largest, 1.0))).ceil_()
        return torch.cat([(self._vectors(vectors) * relative * 2.0**-_WEIGHT_BITS).round_() * -2, relative], 1)


def _whole(values: Float[Tensor, "..."], bits: int) -> tuple[Float[Tensor, "..."], float]:
    """The values as whole numbers of at most 2^bits in float64, and the power of two that they are multiples of."""
    step = 2.0 ** (math.frexp(float(values.abs().max()))[1] - bits)
    return (values.double() * (1 / step)).round_(), step


@njit
def _turned(table, metric, bits, index_bits):
    """`Nearest._centroids` with a metric, number by number."""
    num, length = table.shape
    on_grid, turned = np.empty((length, length)), np.empty((num, length))
    _round_to_grid(metric, _METRIC_BITS, on_grid)
    for k in range(num):
        for j in range(length):
            turned[k, j] = 0
            for i in range(length):
                turned[k, j] += table[k, i] * on_grid[i, j]
    _round_to_grid(turned, bits, turned)
    right, bias = np.empty((length, num)), np.empty(num)
    for k in range(num):
        bias[k] = 0
        for j in range(length):
            bias[k] += table[k, j] * turned[k, j]
            right[j, k] = turned[k, j] * -(2.0 ** (index_bits + 1))
        bias[k] = bias[k] * 2.0**index_bits + k
    return right, bias


@njit
def _round_to_grid(values, bits, found):
    """`_whole`, without its step."""
    most = 0.0
    for value in values.flat:
        most = max(most, abs(value))
    per_step = 2.0 ** (bits - math.frexp(most)[1])
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            found[i, j] = np.rint(values[i, j] * per_step)


@njit(parallel=True)
def _search(vectors, weights, per_step, limit, mask, right, bias, workers, codes):
    for worker in prange(workers):
        _search_part(vectors, weights, per_step, limit, mask, right, bias, worker, workers, codes)


@njit(reorder=True)  # whole numbers add up to the same in any order
def _search_part(vectors, weights, per_step, limit, mask, right, bias, worker, workers, codes):
    """Every `workers`-th group of vectors; terms that a score lacks of `_MOST` are 0."""
    terms = len(right)
    x, factor, least = np.zeros((_MOST, _LANES)), np.zeros(_MOST), np.empty(_LANES)
    for first in range(worker * _LANES, len(vectors), workers * _LANES):
        lanes = min(_LANES, len(vectors) - first)
        for lane in range(lanes):
            if len(weights):
                _weigh(vectors[first + lane], weights[first + lane], per_step, limit, x[:, lane])
            else:
                for i in range(terms):
                    x[i, lane] = _on_grid(vectors[first + lane, i], per_step, limit)
        for lane in range(_LANES):
            least[lane] = np.inf
        for k in range(len(bias)):
            for i in range(terms):
                factor[i] = right[i, k]
            if terms <= 2:
                _compare_two(x, factor, bias[k], least)
            else:
                _compare_four(x, factor, bias[k], least)
        for lane in range(lanes):
            codes[first + lane] = np.int64(least[lane]) & mask


@njit
def _on_grid(value, per_step, limit):
    """`Nearest._vectors`, number by number."""
    return min(max(np.rint(value * per_step), -limit), limit)


@njit
def _weigh(vector, weight, per_step, limit, found):
    """`Nearest._weighted_vectors`, vector by vector."""
    largest, length = 0.0, len(vector)
    for i in range(length):
        largest = max(largest, weight[i])
    per_weight = 2.0**_WEIGHT_BITS / (largest if largest > 0 else 1.0)
    for i in range(length):
        relative = np.ceil(weight[i] * per_weight)
        found[i] = np.rint(_on_grid(vector[i], per_step, limit) * relative * 2.0**-_WEIGHT_BITS) * -2
        found[length + i] = relative


@njit(reorder=True)
def _compare_two(x, factor, bias, least):
    a, b = factor[0], factor[1]
    for lane in range(_LANES):
        score = bias + (x[0, lane] * a + x[1, lane] * b)
        least[lane] = score if score < least[lane] else least[lane]


@njit(reorder=True)
def _compare_four(x, factor, bias, least):
    a, b, c, d = factor[0], factor[1], factor[2], factor[3]
    for lane in range(_LANES):
        score = bias + ((x[0, lane] * a + x[1, lane] * b) + (x[2, lane] * c + x[3, lane] * d))
        least[lane] = score if score < least[lane] else least[lane]
