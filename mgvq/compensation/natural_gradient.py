"""RSAVQ's error direction: plain rounding, its target moved along the natural gradient of the answer loss (method 2.1)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.compensation.damping import check_damping
from mgvq.compensation.none import NoCompensation
from mgvq.errors import UserError
from mgvq.protocols import TargetShift
from mgvq.types import Metric


@dataclass(frozen=True, kw_only=True)
class NaturalGradient(NoCompensation):
    """Nearest codes of `W - step N`, `N = (H_O + a)^-1 G (H_I + b)^-1`, to which the codebook is fitted too.

    Method: EDSG of RSAVQ (Xu et al. 2025). G is the gradient of the right answers' loss at full precision. RSAVQ draws the error
    towards the negative natural gradient by `|W - W^ - lambda N|^2`, whose minimum that target is; the unit of its N is not
    published. Here a and b are `damping` times the mean diagonals, and N is scaled to the norm of W, so that `step` is the share
    of its norm that a layer moves by.

    Raises UserError for a metric without an output factor or with several input factors.
    """

    step: float
    damping: float
    needs_metric: ClassVar[bool] = True
    needs_output_metric: ClassVar[bool] = True

    # As a `TargetShift`: one step, which has no other to beat.
    source: ClassVar[Literal["sft"]] = "sft"
    refresh: ClassVar[bool] = False
    sweeps: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 < self.step <= 1:
            raise UserError(f"compensation.step must lie in (0, 1], got {self.step!r}; for none: compensation=none")
        check_damping("damping", self.damping)

    @property
    def shift(self) -> TargetShift:  # type: ignore[override]
        return self  # type: ignore[return-value]

    @property
    def steps(self) -> list[float]:
        return [self.step]

    def target(
        self, weight: Float[Tensor, "out in"], metric: Metric, gradient: Float[Tensor, "out in"], step: float
    ) -> Float[Tensor, "out in"]:
        """`W - step |W| N / |N|`, float32; W itself for a gradient of 0."""
        assert metric.h_out is not None, "the pipeline checks needs_output_metric"
        h_in, *others = metric.h_in
        if others:
            raise UserError("compensation=natural_gradient needs one input factor a layer: choose curvature=kronecker")
        if not gradient.any():
            return weight.float()
        h_out, h_in = (_damped(h.to(weight.device), self.damping) for h in (metric.h_out, h_in))
        natural = torch.linalg.solve(h_in, torch.linalg.solve(h_out, gradient.double()).T).T
        return (weight.double() - step * weight.double().norm() / natural.norm() * natural).float()


def _damped(matrix: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    wide = matrix.double()
    shift = damping * wide.diagonal().mean().clamp(min=1e-30)
    return wide + shift * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
