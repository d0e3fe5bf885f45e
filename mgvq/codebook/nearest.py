"""Exact search for the nearest centroid: the same code from any number of threads, chunks or processes.

Vectors and centroids are rounded to a grid of a power of two, so that every product and partial sum of the scores is a whole
number below 2^53: a float64 matrix product is exact then, in whatever order it adds. The centroid's index sits in the lowest bits
of its score; the minimum of a row is score and code at once, and of equal scores the lowest index wins.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

_HEADROOM = 3  # bits: vectors may reach 2^3 times the largest centroid, what lies farther out is brought back to that
_METRIC_BITS = 24
_WEIGHT_BITS = 13  # the squares of centroids have the other bits of a product
_CHUNK = 1 << 15  # scores at a time: what a core's cache holds
_BLOCK = 1 << 16  # vectors on the grid at a time


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
        right, bias = self._centroids(metric) if weight is None else self._weighted_centroids()
        rows = max(1, _CHUNK // len(bias))
        best = []
        for start in range(0, len(vectors), _BLOCK):
            block = slice(start, start + _BLOCK)
            left = self._vectors(vectors[block]) if weight is None else self._weighted_vectors(vectors[block], weight[block])
            best += [torch.addmm(bias, part, right).amin(1) for part in left.split(rows)]
        return torch.cat(best).long() & ((1 << self.index_bits) - 1)

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
