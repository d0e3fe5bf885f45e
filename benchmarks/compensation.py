"""What second-order rounding costs, against matrix products and against each other."""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from mgvq.codebook.kmeans import KMeans
from mgvq.compensation.hessian import Hessian
from mgvq.compensation.hessian_two_sided import HessianTwoSided
from mgvq.linalg import damped_solve
from mgvq.protocols import CodedSlice, Compensation, FittedSlice
from mgvq.refit.closed_form import ClosedForm
from mgvq.rng import generator
from mgvq.types import ChannelSlice, Metric, Site

_DEFAULTS = dict(share="layer", table="fp16", weight_power=0.0, iterations=20, sample=128, seed=0)
_FIT_ROWS = 256  # the fit is not what is measured
_ONE_SIDED, _TWO_SIDED = Hessian(damping=0.01), HessianTwoSided(damping=0.01, output_damping=0.1)


def pairs() -> dict[str, tuple[Callable[[], object], str, Callable[[], object]]]:
    """Name -> (what is measured, what it is held against, that)."""
    return {
        "one-sided rounding of a 4096 x 4096 layer, 256 centroids of length 4": (
            partial(_round, _ONE_SIDED, 4096, 4096, 4, 256), "4096^3 matrix product", lambda: torch.mm(*_factors(4096, 4096))
        ),
        "two-sided rounding of a 512 x 256 layer, 16 centroids of length 2": (
            partial(_round, _TWO_SIDED, 512, 256, 2, 16), "one-sided", partial(_round, _ONE_SIDED, 512, 256, 2, 16)
        ),
        "two-sided rounding of a 512 x 256 layer, 16 centroids of length 2, against products": (
            partial(_round, _TWO_SIDED, 512, 256, 2, 16), "L and M times the layer", partial(_products, 512, 256)
        ),
        "refit of a 512 x 256 layer, 256 centroids of length 4": (
            partial(_refit, 512, 256, 4, 256), "one-sided rounding", partial(_round, _ONE_SIDED, 512, 256, 4, 256)
        ),
        "refit of a 512 x 256 layer, 256 centroids of length 4, against a solution": (
            partial(_refit, 512, 256, 4, 256), "1,024 equations by Cholesky, float64", partial(_solution, 1024)
        ),
    }  # fmt: skip


@cache
def _factors(num_out: int, num_in: int) -> tuple[Tensor, Tensor]:
    """Those of input and output, of full rank, with channels that differ in size and go together."""
    return _factor(num_in, "in"), _factor(num_out, "out")


def _factor(size: int, name: str) -> Tensor:
    draws = generator(0, "benchmark", name)
    tokens = torch.randn(size, size, generator=draws) * torch.logspace(-1, 1, size) + torch.randn(size, 1, generator=draws)
    return tokens.T @ tokens / size


@cache
def _layer(num_out: int, num_in: int, length: int, num_centroids: int) -> tuple[Tensor, FittedSlice]:
    weight = torch.randn(num_out, num_in, generator=generator(0, "benchmark", "weight"))
    codebook = KMeans(vector_length=length, **_DEFAULTS)
    rate = next(r for r in codebook.rates() if r.name == f"{length}x{num_centroids}")
    channel_slice = ChannelSlice(Site("layer", "language", "layer", None, num_out, num_in), 0, torch.arange(num_in))
    return weight, FittedSlice(channel_slice, codebook.fit("layer", [weight[:_FIT_ROWS]], rate, [None], [])[0])


def _products(num_out: int, num_in: int) -> Tensor:
    h_in, h_out = _factors(num_out, num_in)
    return h_out @ (_layer(num_out, num_in, 2, 16)[0] @ h_in)


def _solution(size: int) -> Tensor:
    h_in, _ = _factors(size, size)
    return damped_solve(h_in, h_in[:, :1], 0.1)


def _round(method: Compensation, num_out: int, num_in: int, length: int, num_centroids: int) -> Tensor:
    weight, fitted = _layer(num_out, num_in, length, num_centroids)
    h_in, h_out = _factors(num_out, num_in)
    return method.round(weight, Metric((h_in,), h_out), [fitted], h_in.diagonal(), [])[0]


@cache
def _codes(*sizes: int) -> Tensor:
    return _round(_ONE_SIDED, *sizes)


def _refit(*sizes: int) -> None:
    weight, fitted = _layer(*sizes)
    h_in, h_out = _factors(*sizes[:2])
    coded = CodedSlice(fitted=fitted, codes=_codes(*sizes), target=weight, metric=Metric((h_in,), h_out))
    ClosedForm(damping=0.1, rounds=1)([coded])
