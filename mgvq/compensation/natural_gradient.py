"""RSAVQ's error direction: plain rounding of a target that is moved along the natural gradient of the answer loss."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from mgvq.compensation.damping import check_damping
from mgvq.compensation.direction import natural_gradient
from mgvq.compensation.none import NoCompensation
from mgvq.errors import UserError
from mgvq.protocols import TargetShift
from mgvq.types import Metric


@dataclass(frozen=True, kw_only=True)
class NaturalGradient(NoCompensation):
    """Nearest codes of `W - step N`, `N = (H_O + a I)^-1 G (H_I + b I)^-1`, to which the codebook is fitted too.

    This is the EDSG of RSAVQ (Xu et al. 2025; docs/method.md, eq. (natural-gradient)). G is the gradient of the right answers'
    loss at full precision. RSAVQ draws the error towards the negative natural gradient by `|W - W^ - lambda N|^2`, whose minimum
    is this target; the unit of its N is not published. Here N is scaled to the norm of W.

    Raises UserError for a metric with several input factors.
    """

    step: float
    """The share of its norm that a layer moves by, in (0, 1]."""
    damping: float
    """a and b as a share of the mean diagonals of the two factors, in (0, 1]."""
    needs_metric: ClassVar[bool] = True
    needs_output_metric: ClassVar[bool] = True

    # As a `TargetShift` it has one step, which is taken without trying another.
    source: ClassVar[str] = "sft"
    start: ClassVar[str] = "full_precision"
    refresh: ClassVar[bool] = False
    sweeps: ClassVar[int] = 1
    racing: ClassVar[float | None] = None
    minibatches: ClassVar[int] = 1

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

    def direction(self, metric: Metric, gradient: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return N in float64."""
        assert metric.h_out is not None, "the pipeline checks needs_output_metric"
        if len(metric.h_in) > 1:
            raise UserError("compensation=natural_gradient needs one input factor a layer: choose curvature=kronecker")
        return natural_gradient(gradient, metric.to(gradient.device), self.damping)

    def target(self, weight: Float[Tensor, "out in"], direction: Float[Tensor, "out in"], step: float) -> Float[Tensor, "out in"]:
        """Return `W - step |W| N / |N|` in float32; W itself for a gradient of 0."""
        if not direction.any():
            return weight.float()
        return (weight.double() - step * weight.double().norm() / direction.norm() * direction).float()
