"""Gradient-aware second-order compensation: the rounding target is moved by a damped natural-gradient step (method 3.9)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.compensation.damping import check_damping
from mgvq.compensation.hessian import Hessian
from mgvq.compensation.hessian_two_sided import HessianTwoSided
from mgvq.errors import UserError
from mgvq.protocols import FittedSlice, TargetShift
from mgvq.types import Metric

Source = Literal["kl", "block", "sft"]


@dataclass(frozen=True, kw_only=True)
class GradientHessian:
    """`hessian` about `W~ = W - eta N`, `N = (H_O + g_O I)^-1 G (H_I + g_I I)^-1`, instead of about W.

    With an `output_damping` it is `hessian_two_sided` about W~.

    Completing the square of `<G, D> + 1/2 tr(H_O D H_I D^T)` gives exactly this target (method 3.9 i). The full step of a
    gradient from a few samples diverges: `shift_damping` of the mean diagonals is added to both factors, and eta is such that a
    layer moves by `step` of its norm, never beyond the full step. The pipeline takes one step a block, the one of `steps` with
    the least loss on held-out samples.

    `source`: `kl`, the divergence from the full-precision model with the blocks before this one quantised, so the first block has
    none; `block`, the squared drift of the block's output, every token weighted by the energy of its gradient (no pass through
    the blocks behind); `sft`, the loss of the right answers. `refresh`: taken again at every block, or for every so many blocks
    together (not `block`, where each has a loss of its own); without it once, at full precision (`sft` alone). `sweeps`: how
    often the blocks are gone through; from the second time on all of them are quantised.
    A reconstruction: the paper's formula is not public.
    """

    damping: float  # share of the mean diagonal of h_in that is added to it
    output_damping: float | None  # the same of h_out; None: errors are not corrected from row to row
    source: Source
    refresh: bool | int
    sweeps: int
    steps: list[float]
    shift_damping: float
    needs_metric: ClassVar[bool] = True
    uses_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        assert self._rounding  # checks the dampings
        if self.source not in get_args(Source):
            raise UserError(f"compensation.source must be one of {', '.join(get_args(Source))}; got {self.source!r}")
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
        check_damping("shift_damping", self.shift_damping)

    @property
    def needs_output_metric(self) -> bool:
        return self.output_damping is not None

    @property
    def corrects_rows(self) -> bool:
        return self.output_damping is not None

    @property
    def shift(self) -> TargetShift:
        return self

    @property
    def _rounding(self) -> Hessian | HessianTwoSided:
        if self.output_damping is None:
            return Hessian(damping=self.damping)
        return HessianTwoSided(damping=self.damping, output_damping=self.output_damping)

    def round(
        self,
        weight: Float[Tensor, "out in"],
        metric: Metric | None,
        slices: Sequence[FittedSlice],
        score: Float[Tensor, "in"],
        flags: list[str],
    ) -> Sequence[Tensor]:
        return self._rounding.round(weight, metric, slices, score, flags)

    def target(
        self, weight: Float[Tensor, "out in"], metric: Metric, gradient: Float[Tensor, "out in"], step: float
    ) -> Float[Tensor, "out in"]:
        """`W~`, float32; W itself for a step of 0 or a gradient of 0. Rows in runs of their own `h_in` are shifted by those."""
        wide = weight.double()
        if step == 0 or not gradient.any():
            return weight.float()
        size = -(-len(weight) // len(metric.h_in))
        runs = zip(gradient.double().split(size), metric.h_in, strict=True)
        natural = torch.cat([_solve(h.to(weight.device), part.T, self.shift_damping).T for part, h in runs])
        if metric.h_out is not None:
            natural = _solve(metric.h_out.to(weight.device), natural, self.shift_damping)
        share = step * wide.norm() / natural.norm()
        return (wide - min(1.0, float(share)) * natural).float()


def _solve(matrix: Float[Tensor, "n n"], right: Float[Tensor, "n k"], damping: float) -> Float[Tensor, "n k"]:
    """`(matrix + damping * mean diagonal * I)^-1 right` in float64."""
    wide = matrix.double()
    damped = wide + damping * wide.diagonal().mean().clamp(min=1e-30) * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    return torch.cholesky_solve(right, torch.linalg.cholesky(damped))
