"""Weighted k-means whose result does not depend on thread count, chunk size, process or order of the sums.

Assignments are exact (`Nearest`). Sums are of whole numbers below 2^53 in float64 (fixed point), which add up to the same in any
order.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.codebook.nearest import Nearest

_SUM_BITS = 52
SEEDS = ("plus_plus", "mahalanobis")
_SEED_SAMPLE = 8  # vectors per centroid that the seeds are drawn from


@dataclass(frozen=True, slots=True)
class Clusters:
    """Centroids, and how often a cluster ran empty and was moved to the worst-served vector."""

    centroids: Float[Tensor, "k d"]
    num_reseeded: int


def kmeans(
    vectors: Float[Tensor, "n d"],
    num_centroids: int,
    generator: torch.Generator,
    weight: Float[Tensor, "n d"] | None = None,
    iterations: int = 25,
    seeds: str = "plus_plus",
) -> Clusters:
    """k-means++ seeds, or other `SEEDS`, then Lloyd's iterations until nothing moves; minimises `sum weight (x - c)^2`.

    `weight` is >= 0 and per coordinate; a coordinate of no weight in a whole cluster keeps its centroid. An empty cluster moves
    to the vector that is served worst. Without more vectors than centroids, each vector is one, and the rest repeat some of them.
    Raises ValueError for no vectors, non-finite ones, or negative weights.
    """
    if not len(vectors) or not torch.isfinite(vectors).all():
        raise ValueError(f"k-means needs finite vectors, got {tuple(vectors.shape)} with non-finite or no entries")
    if weight is not None and not (torch.isfinite(weight).all() and (weight >= 0).all()):
        raise ValueError("k-means weights must be finite and >= 0")
    if len(vectors) <= num_centroids:
        return Clusters(vectors[torch.arange(num_centroids, device=vectors.device) % len(vectors)].float(), 0)
    centroids = _plus_plus(vectors, num_centroids, generator, weight) if seeds == "plus_plus" else _spread(vectors, num_centroids)
    previous, num_reseeded = None, 0
    for _ in range(iterations):
        codes = Nearest(centroids)(vectors, weight)
        if previous is not None and torch.equal(codes, previous):
            break
        moved = _means(vectors, codes, centroids, weight)
        empty = torch.nonzero(torch.bincount(codes, minlength=num_centroids) == 0).flatten()
        if len(empty):
            distances = _distances(vectors, centroids[codes], weight)
            worst = torch.argsort(distances, descending=True, stable=True)[: len(empty)]
            worst = worst[distances[worst] > 0]  # a vector that is met exactly gains nothing
            moved[empty[: len(worst)]] = vectors[worst]
            num_reseeded += len(worst)
        centroids, previous = moved, codes
    return Clusters(centroids, num_reseeded)


def exact_sum(values: Float[Tensor, "..."]) -> float:
    """The sum to 2^-52 of the largest value, whatever the order in which threads add it."""
    whole, scale = _fixed_point(values, values.numel())
    return float(whole.sum()) / scale


def _plus_plus(
    vectors: Float[Tensor, "n d"], num_centroids: int, generator: torch.Generator, weight: Float[Tensor, "n d"] | None
) -> Float[Tensor, "k d"]:
    """Each next seed is drawn with probability proportional to its distance to the nearest seed so far.

    In numpy, on the CPU: thousands of short steps, each of which depends on the last, and whose sums numpy takes in order.
    """
    draws = torch.rand(num_centroids, generator=generator, dtype=torch.float64).tolist()
    candidates = torch.arange(len(vectors))
    if len(vectors) > _SEED_SAMPLE * num_centroids:
        candidates = torch.randperm(len(vectors), generator=generator)[: _SEED_SAMPLE * num_centroids]
    candidates = candidates.to(vectors.device)
    columns = vectors[candidates].T.double().cpu().numpy()
    weights = 1.0 if weight is None else weight[candidates].T.double().cpu().numpy()
    chosen = [int(draws[0] * len(candidates))]
    best = np.full(len(candidates), np.inf)
    for draw in draws[1:]:
        difference = columns - columns[:, chosen[-1:]]
        np.minimum(best, (weights * difference * difference).sum(0), out=best)
        mass = best.cumsum()
        index = int(np.searchsorted(mass, draw * mass[-1], side="right"))
        chosen.append(min(index, len(candidates) - 1))
    return vectors[candidates[chosen]].float()


def _spread(vectors: Float[Tensor, "n d"], num_centroids: int) -> Float[Tensor, "k d"]:
    """Vectors at even places of the order by Mahalanobis distance from the mean, the nearest and the farthest among them (GPTVQ).

    In numpy, on the CPU, in float64, where sums are taken in one order. A direction without any variance does not count.
    """
    wide = vectors.double().cpu().numpy()
    centred = wide - wide.mean(0)
    precision = np.linalg.pinv(centred.T @ centred / len(wide), hermitian=True)
    distances = np.einsum("nd,de,ne->n", centred, precision, centred)
    places = np.linspace(0, len(wide) - 1, num_centroids).round().astype(np.int64)
    return vectors[torch.from_numpy(np.argsort(distances, kind="stable")[places]).to(vectors.device)].float()


def _means(
    vectors: Float[Tensor, "n d"],
    codes: Int[Tensor, "n"],
    centroids: Float[Tensor, "k d"],
    weight: Float[Tensor, "n d"] | None,
) -> Float[Tensor, "k d"]:
    if weight is None:
        mass = torch.bincount(codes, minlength=len(centroids)).double()[:, None]
        total = _segment_sums(vectors, codes, len(centroids))
    else:
        mass, total = (_segment_sums(t, codes, len(centroids)) for t in (weight, vectors * weight))
    return torch.where(mass > 0, total / mass.clamp(min=1e-300), centroids.double()).float()


def _segment_sums(values: Float[Tensor, "n d"], codes: Int[Tensor, "n"], num: int) -> Float[Tensor, "k d"]:
    whole, scale = _fixed_point(values, len(values))
    sums = torch.zeros(num, values.shape[1], dtype=torch.float64, device=values.device)
    return sums.index_add_(0, codes, whole) / scale


def _fixed_point(values: Float[Tensor, "..."], count: int) -> tuple[Float[Tensor, "..."], float]:
    """The values as whole numbers in float64, `count` of which add up to less than 2^53, and the scale that makes them so."""
    largest = float(values.abs().max())
    scale = 2.0 ** (_SUM_BITS - count.bit_length()) / (largest or 1.0)
    return (values.double() * scale).round_(), scale


def _distances(
    vectors: Float[Tensor, "n d"], centroids: Float[Tensor, "n d"], weight: Float[Tensor, "n d"] | None
) -> Float[Tensor, "n"]:
    """`sum_j weight_j (x_j - c_j)^2`, column by column: a sum over a dimension has no fixed order."""
    terms = (vectors - centroids).square() * (1 if weight is None else weight)
    total = torch.zeros_like(terms[:, 0])
    for column in terms.T:
        total += column
    return total
