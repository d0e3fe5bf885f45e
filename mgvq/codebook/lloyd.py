"""Weighted k-means whose result does not depend on thread count, chunk size, process or order of the sums.

Distances are sums of elementwise products in a fixed order, never a matrix product. Cluster sums are taken in 64-bit integers
(fixed point), which add up to the same number in any order.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_CHUNK = 1 << 14  # vectors at a time: what a core's cache holds
_SUM_BITS = 62


@dataclass(frozen=True, slots=True)
class Clusters:
    """Centroids, and how often a cluster ran empty and was moved to the worst-served vector."""

    centroids: Float[Tensor, "k d"]
    num_reseeded: int


def nearest(
    vectors: Float[Tensor, "n d"], centroids: Float[Tensor, "k d"], weight: Float[Tensor, "n d"] | None = None
) -> tuple[Int[Tensor, "n"], Float[Tensor, "n"]]:
    """Index of the nearest centroid in `sum_j weight_j (x_j - c_j)^2` (the lowest index among equals), and that distance."""
    codes = torch.zeros(len(vectors), dtype=torch.long, device=vectors.device)
    distances = torch.full((len(vectors),), torch.inf, device=vectors.device)
    columns = vectors.T.contiguous()
    weights = None if weight is None else weight.T.contiguous()
    rows = centroids.tolist()
    for at in range(0, len(vectors), _CHUNK):
        part = slice(at, at + _CHUNK)
        best, code = distances[part], codes[part]
        for k, row in enumerate(rows):
            total = torch.zeros_like(best)
            for j, value in enumerate(row):
                difference = columns[j, part] - value
                squared = difference.mul_(difference)
                total += squared if weights is None else squared.mul_(weights[j, part])
            code.masked_fill_(total < best, k)
            torch.minimum(best, total, out=best)
    return codes, distances


def kmeans(
    vectors: Float[Tensor, "n d"],
    num_centroids: int,
    generator: torch.Generator,
    weight: Float[Tensor, "n d"] | None = None,
    iterations: int = 25,
) -> Clusters:
    """k-means++ seeds, then Lloyd's iterations until nothing moves; minimises `sum weight (x - c)^2`.

    `weight` is >= 0 and per coordinate; a coordinate of no weight in a whole cluster keeps its centroid. An empty cluster moves
    to the vector that is served worst. With fewer distinct vectors than centroids the rest repeat some of them.
    Raises ValueError for no vectors, non-finite ones, or negative weights.
    """
    if not len(vectors) or not torch.isfinite(vectors).all():
        raise ValueError(f"k-means needs finite vectors, got {tuple(vectors.shape)} with non-finite or no entries")
    if weight is not None and not (torch.isfinite(weight).all() and (weight >= 0).all()):
        raise ValueError("k-means weights must be finite and >= 0")
    centroids = _plus_plus(vectors, num_centroids, generator, weight)
    previous, num_reseeded = None, 0
    for _ in range(iterations):
        codes, distances = nearest(vectors, centroids, weight)
        if previous is not None and torch.equal(codes, previous):
            break
        centroids = _means(vectors, codes, centroids, weight)
        centroids, moved = _reseed(vectors, codes, distances, centroids)
        previous, num_reseeded = codes, num_reseeded + moved
    return Clusters(centroids, num_reseeded)


def _plus_plus(
    vectors: Float[Tensor, "n d"], num_centroids: int, generator: torch.Generator, weight: Float[Tensor, "n d"] | None
) -> Float[Tensor, "k d"]:
    """Each next seed is drawn with probability proportional to its distance to the nearest seed so far."""
    draws = torch.rand(num_centroids, generator=generator, dtype=torch.float64).tolist()
    chosen = [int(draws[0] * len(vectors))]
    best = torch.full((len(vectors),), torch.inf, device=vectors.device)
    for draw in draws[1:]:
        best = torch.minimum(best, nearest(vectors, vectors[chosen[-1:]], weight)[1])
        mass = _fixed_point(best)[0].cumsum(0)
        target = int(draw * int(mass[-1]))
        index = torch.searchsorted(mass, torch.tensor([target], device=mass.device), right=True)
        chosen.append(min(int(index), len(vectors) - 1))
    return vectors[chosen].clone()


def _means(
    vectors: Float[Tensor, "n d"],
    codes: Int[Tensor, "n"],
    centroids: Float[Tensor, "k d"],
    weight: Float[Tensor, "n d"] | None,
) -> Float[Tensor, "k d"]:
    weight = torch.ones_like(vectors) if weight is None else weight
    total, mass = (_segment_sums(t, codes, len(centroids)) for t in (vectors * weight, weight))
    return torch.where(mass > 0, total / mass.clamp(min=1e-300), centroids.double()).float()


def _segment_sums(values: Float[Tensor, "n d"], codes: Int[Tensor, "n"], num: int) -> Float[Tensor, "k d"]:
    fixed, scale = _fixed_point(values)
    sums = torch.zeros(num, values.shape[1], dtype=torch.int64, device=values.device)
    return sums.index_add_(0, codes, fixed).double() / scale


def _fixed_point(values: Float[Tensor, "n *d"]) -> tuple[Int[Tensor, "n *d"], Float[Tensor, ""]]:
    """The values as integers that can be summed over n without overflow, and the scale that makes them so."""
    largest = values.abs().max().double()
    scale = 2.0 ** (_SUM_BITS - len(values).bit_length()) / torch.where(largest > 0, largest, 1.0)
    return (values.double() * scale).round().long(), scale


def _reseed(
    vectors: Float[Tensor, "n d"],
    codes: Int[Tensor, "n"],
    distances: Float[Tensor, "n"],
    centroids: Float[Tensor, "k d"],
) -> tuple[Float[Tensor, "k d"], int]:
    empty = torch.nonzero(torch.bincount(codes, minlength=len(centroids)) == 0).flatten()
    worst = torch.argsort(distances, descending=True, stable=True)[: len(empty)]
    worst = worst[distances[worst] > 0]  # a vector that is met exactly gains nothing
    centroids[empty[: len(worst)]] = vectors[worst]
    return centroids, len(worst)
