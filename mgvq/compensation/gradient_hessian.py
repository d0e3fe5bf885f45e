"""Gradient-aware second-order compensation: the target of rounding is moved by a damped natural-gradient step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from mgvq.compensation.damping import check_damping
from mgvq.compensation.direction import natural_gradient
from mgvq.compensation.hessian import Hessian
from mgvq.compensation.hessian_two_sided import HessianTwoSided
from mgvq.errors import UserError
from mgvq.protocols import FittedSlice, TargetShift
from mgvq.types import Metric

SOURCES = ("kl", "block", "sft")
STARTS = ("rounded", "full_precision")


@dataclass(frozen=True, kw_only=True)
class GradientHessian:
    """`hessian` about `W~ = W - eta N`, `N = (H_O + g_O I)^-1 G (H_I + g_I I)^-1`, instead of about W.

    Completing the square of `<G, D> + 1/2 tr(H_O D H_I D^T)` gives exactly this target (docs/method.md, eq. (shift)). The full
    step of a gradient from a few samples diverges: both factors are damped, and eta is such that a layer moves by a given share
    of its norm, never beyond the full step. It is a reconstruction: the paper's formula is not public.
    """

    damping: float
    """The share of its diagonal that is added to `h_in` in rounding, in (0, 1]; `damping_of` says how."""
    output_damping: float | None
    """The same of `h_out`: rounding is that of `hessian_two_sided`. With None errors are not corrected from row to row."""
    source: str
    """What the gradient is of. `kl`: the divergence from the full-precision model. `block`: the squared drift of the block's
    output, every token weighted by the squared norm of its gradient, without a pass through the blocks behind. `sft`: the loss of
    the right answers."""
    start: str
    """What the first gradients are taken at. `rounded`: the model with all layers rounded by `hessian`, so that a gradient holds
    what all others have cost, from the first block on. `full_precision`: the model with the blocks before this one quantised and
    those behind it not, so that the first block has none."""
    refresh: bool | int
    """True: the gradient is taken again at every block. A number n: for n blocks together (not with `block`, where each block has
    a loss of its own). False: once, at full precision (`sft` alone)."""
    sweeps: int
    """How often the blocks are gone through with gradients, after a `rounded` start or from full precision on."""
    steps: list[float]
    """The shares of a layer's norm that are tried, ascending from 0; each block takes the one with the least held-out loss."""
    shift_damping: float
    """The share of their diagonals that is added to both factors of N, in (0, 1], by `damping_of` as well."""
    damping_of: str = "mean"
    """What the dampings are shares of, as in `Hessian`."""
    minibatches: int = 1
    """The calibration samples are dealt to so many parts, batch by batch, and each gradient is taken of the next part: with 4 of
    a quarter of the samples, another one each time. There are at most as many as batches; 1: every gradient sees all."""
    racing: float | None = None
    """The p-value, in (0, 1), below which a step is given up as soon as a part of the held-out samples says that it loses. None:
    every step is asked about all of them."""
    order: str = "score"
    """Which vector is rounded first, as in `Hessian`."""
    needs_metric: ClassVar[bool] = True
    uses_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        assert self._rounding  # checks the dampings
        if self.source not in SOURCES:
            raise UserError(f"compensation.source must be one of {', '.join(SOURCES)}; got {self.source!r}")
        if self.start not in STARTS:
            raise UserError(f"compensation.start must be one of {', '.join(STARTS)}; got {self.start!r}")
        if self.start == "rounded" and not self.refresh:
            raise UserError(
                "compensation.start=rounded with refresh=false: that gradient is taken at full precision. Set "
                "compensation.start=full_precision, or compensation.refresh=true."
            )
        if self.source != "sft" and not self.refresh:
            raise UserError(
                f"compensation.source={self.source} with refresh=false has no effect: at full precision that gradient is zero. "
                "Set compensation.refresh=true, or compensation.source=sft."
            )
        if not isinstance(self.refresh, bool) and not (isinstance(self.refresh, int) and self.refresh >= 2):
            raise UserError(
                f"compensation.refresh must be true (at every block), false, or a number of blocks >= 2, got {self.refresh!r}"
            )
        if self.source == "block" and self.refresh is not True:
            raise UserError(
                f"compensation.source=block with refresh={self.refresh}: the loss is that of each block's own output. "
                "Set compensation.refresh=true, or compensation.source=kl."
            )
        if not (isinstance(self.sweeps, int) and self.sweeps >= 1):
            raise UserError(f"compensation.sweeps must be a whole number >= 1, got {self.sweeps!r}")
        if self.sweeps > 1 and not self.refresh:
            raise UserError(f"compensation.sweeps={self.sweeps} goes on with new gradients: set compensation.refresh=true.")
        if not self.steps or self.steps[0] != 0 or sorted(set(self.steps)) != self.steps or self.steps[-1] > 1:
            raise UserError(
                f"compensation.steps must rise from 0 to at most 1, got {self.steps}: 0 is what the others have to beat."
            )
        if len(self.steps) == 1 and (self.start == "rounded" or self.sweeps > 1):
            raise UserError(
                f"compensation.steps={self.steps} has no step to take: once a block is rounded, only steps larger than 0 are "
                "tried. Add one, such as 0.1; or set compensation=hessian, which takes no gradient."
            )
        if not (type(self.minibatches) is int and self.minibatches >= 1):
            raise UserError(f"compensation.minibatches must be a whole number >= 1, got {self.minibatches!r}")
        if self.minibatches > 1 and not self.refresh:
            raise UserError(
                f"compensation.minibatches={self.minibatches} has no effect with refresh=false, whose gradient is taken once, "
                "with the statistics: set it to 1, or compensation.refresh=true."
            )
        check_damping("shift_damping", self.shift_damping)
        if self.racing is not None and not 0 < self.racing < 1:
            raise UserError(
                f"compensation.racing must lie in (0, 1), got {self.racing!r}; null asks all samples about every step."
            )

    @property
    def needs_output_metric(self) -> bool:
        return self.output_damping is not None

    @property
    def shift(self) -> TargetShift:
        return self

    @property
    def _rounding(self) -> Hessian | HessianTwoSided:
        if self.output_damping is None:
            return Hessian(damping=self.damping, damping_of=self.damping_of, order=self.order)
        return HessianTwoSided(
            damping=self.damping, output_damping=self.output_damping, damping_of=self.damping_of, order=self.order
        )

    def round(
        self,
        weight: Float[Tensor, "out in"],
        metric: Metric | None,
        slices: Sequence[FittedSlice],
        score: Float[Tensor, "in"],
        flags: list[str],
    ) -> Sequence[Tensor]:
        return self._rounding.round(weight, metric, slices, score, flags)

    def direction(self, metric: Metric, gradient: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return N in float64."""
        return natural_gradient(gradient, metric.to(gradient.device), self.shift_damping, self.damping_of)

    def target(self, weight: Float[Tensor, "out in"], direction: Float[Tensor, "out in"], step: float) -> Float[Tensor, "out in"]:
        """Return `W~` in float32; W itself for a step of 0 or a gradient of 0."""
        if step == 0 or not direction.any():
            return weight.float()
        wide = weight.double()
        share = step * wide.norm() / direction.norm()
        return (wide - min(1.0, float(share)) * direction).float()
