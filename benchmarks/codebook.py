"""What fitting and encoding by a codebook cost, against matrix products and the plainest search."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mgvq.codebook.kmeans import KMeans
from mgvq.codebook.lloyd import kmeans
from mgvq.codebook.nearest import Nearest
from mgvq.formats.packing import pack, unpack
from mgvq.formats.vector import to_vectors
from mgvq.rng import generator

_DEFAULTS = dict(share="layer", table="fp16", weight_power=0.0, iterations=20, sample=512, seed=0)  # conf/codebook/kmeans.yaml


def pairs() -> dict[str, tuple[Callable[[], object], str, Callable[[], object]]]:
    """Name -> (what is measured, what it is held against, that)."""
    draws = generator(0, "benchmark")
    small, large = (torch.randn(n, n, generator=draws) for n in (1024, 4096))
    vectors, table = torch.randn(65536, 4, generator=draws), torch.randn(256, 4, generator=draws)
    few, short, root = (torch.randn(n, 2, generator=draws) for n in (256, 16, 2))
    find = Nearest(short)
    codes = torch.randint(16, (1 << 20,), generator=draws)
    packed = pack(codes, 4)
    return {
        "nearest of 256 centroids, 65,536 x 4": (
            lambda: Nearest(table)(vectors), "torch.cdist + argmin", lambda: _cdist(vectors, table)
        ),
        "nearest of 16 centroids in a metric, 256 x 2, 100 times": (
            lambda: [find(few, metric=root.T @ root) for _ in range(100)],
            "100 x (torch.cdist + argmin)",
            lambda: [_cdist(few, short) for _ in range(100)],
        ),
        "k-means, 256 centroids, 65,536 x 4, 25 iterations": (
            lambda: kmeans(vectors, 256, generator(0, "k")),
            "25 x (torch.cdist + argmin)",
            lambda: [_cdist(vectors, table) for _ in range(25)],
        ),
        "fit and encoding of a 128 x 128 layer at all 8 rates of length 2": (
            partial(_all_rates, small[:128, :128]), "1024^3 matrix product", partial(torch.mm, small, small)
        ),
        "pack 1 Mi codes of 4 bits": (lambda: pack(codes, 4), "1024^3 matrix product", partial(torch.mm, small, small)),
        "unpack 1 Mi codes of 4 bits": (
            lambda: unpack(packed, 4, len(codes)), "1024^3 matrix product", partial(torch.mm, small, small)
        ),
        "fit and encoding of a 4096 x 4096 layer, 256 centroids of length 4": (
            partial(_layer, large), "4096^3 matrix product", partial(torch.mm, large, large)
        ),
    }  # fmt: skip


def _cdist(vectors: Tensor, table: Tensor) -> Tensor:
    return torch.cdist(vectors, table).argmin(1)


def _layer(weight: Tensor) -> None:
    codebook = KMeans(vector_length=4, **_DEFAULTS)
    rate = next(r for r in codebook.rates() if r.name == "4x256")
    codebook.fit("layer", [weight], rate, [None], [])[0].encode(to_vectors(weight, 4), 0, None)


def _all_rates(weight: Tensor) -> None:
    codebook = KMeans(vector_length=2, **_DEFAULTS)
    for rate in codebook.rates():
        codebook.fit("layer", [weight], rate, [None], [])[0].encode(to_vectors(weight, 2), 0, None)
