"""How near a layer was rounded to what no code can do better: the rate-distortion limit at the bits that it stores."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.rate_distortion import eigenvalues, least_damage
from mgvq.types import LayerProblem, Metric, Site

DAMPING = 0.01  # of the mean diagonal of each factor; without it directions that no sample has reached would be free of errors


@dataclass(frozen=True, slots=True)
class Limit:
    """What a code of a layer's bits could reach, and what was reached, in the damped metric that the layer was rounded in."""

    bits: float
    """Stored bits a weight."""
    limit: float
    """The least error of a Gaussian layer of this size, over the loss for leaving the whole layer out."""
    times: float
    """The error of the stored layer against what was to be rounded, over that least error; NaN where no error counts."""


class Limits:
    """The limit of every layer (docs/method.md, eq. (limit)), by the `bits` a weight that each stores.

    The eigenvalues of a factor are computed once, also where several layers or trials have it.
    """

    def __init__(self, bits: Mapping[Site, float]) -> None:
        self.bits = bits
        self._eigenvalues: dict[bytes, Tensor] = {}  # by the digest of the factor

    def __call__(self, problem: LayerProblem, values: Float[Tensor, "out in"]) -> Limit:
        """`values` are what the stored layer stands for in the basis of the problem. All is measured against its target."""
        target, bits = problem.target.float(), self.bits[problem.site]
        metric = None if problem.metric is None else _damped(problem.metric)
        least = float(target.double().square().mean()) * self._least_damage(metric, target.shape, bits)
        error, whole = _loss(metric, values.to(target) - target), _loss(metric, problem.whole())
        return Limit(bits, least / max(whole, 1e-30), error / least if least > 0 else math.nan)

    def _least_damage(self, metric: Metric | None, shape: torch.Size, bits: float) -> float:
        """The limit for weights of variance 1; twice that of `Metric.loss`."""
        if metric is None:
            return shape.numel() * 4.0**-bits
        if len(metric.h_in) == 1 and metric.h_out is None and (level := _high_rate_level(metric.h_in[0], bits)) is not None:
            return shape.numel() * level
        runs = metric.row_runs(shape[0])
        inputs = [self._of(factor) for _, factor in runs]
        if (h_out := metric.dense_h_out()) is None:
            sizes = [rows.stop - rows.start for rows, _ in runs]
            together = math.gcd(*sizes)  # rows with one list of eigenvalues, which has those of each run as often as that takes
            repeated = torch.cat([values.repeat(size // together) for values, size in zip(inputs, sizes, strict=True)])
            return least_damage(repeated, torch.ones(together), bits)
        outputs = [self._of(h_out[rows, rows]) for rows, _ in runs]
        if len(runs) == 1:
            return least_damage(inputs[0], outputs[0], bits)
        products = [torch.outer(rows, columns).flatten() for rows, columns in zip(outputs, inputs, strict=True)]
        return least_damage(torch.cat(products), torch.ones(1), bits)

    def _of(self, factor: Float[Tensor, "n n"]) -> Float[Tensor, "n"]:
        digest = hashlib.sha256(factor.detach().cpu().contiguous().numpy().data).digest()
        if digest not in self._eigenvalues:
            self._eigenvalues[digest] = eigenvalues(factor)
        return self._eigenvalues[digest]


def _damped(metric: Metric) -> Metric:
    return Metric(
        tuple(map(_with_damping, metric.h_in)), None if (h_out := metric.dense_h_out()) is None else _with_damping(h_out)
    )


def _with_damping(factor: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    damped = factor.float().clone()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    return damped


def _loss(metric: Metric | None, error: Float[Tensor, "out in"]) -> float:
    """`tr(h_out D h_in D^T)`."""
    return float(error.double().square().sum()) if metric is None else 2 * metric.loss(error)


def _high_rate_level(factor: Float[Tensor, "n n"], bits: float) -> float | None:
    """The water level `det(H)^(1/n) 4^-bits` where it surely lies below every eigenvalue of the damped factor, else None.

    Below them all, the limit needs no eigenvalues, which cost five times what a determinant does.
    """
    floor = float(factor.diagonal().mean()) * DAMPING / (1 + DAMPING)
    root, failed = torch.linalg.cholesky_ex(factor.double())
    if failed:
        return None
    level = math.exp(2 * float(root.diagonal().log().mean())) * 4.0**-bits
    return level if level <= floor else None
