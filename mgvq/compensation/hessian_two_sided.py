"""Second-order compensation in both directions: along the input channels of a row, and from row to row (method 3.9 iii, iv)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.compensation.damping import check_damping
from mgvq.compensation.ldl import block_ldl
from mgvq.compensation.ldlq import Coded, Encode, ldlq
from mgvq.errors import UserError
from mgvq.protocols import FittedSlice, TargetShift
from mgvq.types import Metric


@dataclass(frozen=True, kw_only=True)
class HessianTwoSided:
    """Two-sided block-LDL rounding in the Kronecker metric: a vector's error is corrected in later vectors and in other rows.

    With `h_in = L D L^T` as in `Hessian`, `h_out = M diag(s) M^T` and `Delta = W - W^`, row r of vector j is rounded at the
    (r, j) entry of `W + (M^T Delta L - Delta)`, which depends on vectors and rows that are done. What remains, `E = M^T Delta L`,
    costs `tr(h_out Delta h_in Delta^T) = sum_rj s_r |root_j E_rj|^2`: a row's weight does not move its nearest code, so the
    metric of a vector is that of `Hessian`, and an `h_out` of the identity gives its codes.

    Within a vector the row with the largest diagonal of `h_out` is rounded first, equal ones in their order. Feedback in both
    directions fits the metric more closely than in one, its noise as well: it wants more damping than `Hessian`.

    Flags: those of `Hessian`, and `output_damping:<site>:<share>` where `h_out` needed more. Raises UserError for a metric
    without an output factor, or with several input factors.
    """

    damping: float  # share of the mean diagonal of h_in that is added to it
    output_damping: float  # the same of h_out
    needs_metric: ClassVar[bool] = True
    needs_output_metric: ClassVar[bool] = True
    uses_score: ClassVar[bool] = True
    corrects_rows: ClassVar[bool] = True
    shift: ClassVar[TargetShift | None] = None

    def __post_init__(self) -> None:
        check_damping("damping", self.damping)
        check_damping("output_damping", self.output_damping)

    def round(
        self,
        weight: Float[Tensor, "out in"],
        metric: Metric | None,
        slices: Sequence[FittedSlice],
        score: Float[Tensor, "in"],
        flags: list[str],
    ) -> Sequence[Tensor]:
        assert metric is not None, "the pipeline checks needs_metric"
        if metric.h_out is None or len(metric.h_in) > 1:
            raise UserError(
                "compensation=hessian_two_sided corrects errors from row to row, but this curvature has not one input and "
                "one output factor a layer: choose curvature=kronecker, or compensation=hessian"
            )
        mix, damping = _row_feedback(metric.h_out.to(weight.device), self.output_damping)
        if damping > self.output_damping:
            flags.append(f"output_damping:{slices[0].channel_slice.site.name}:{damping:g}")

        def choose(encode: Encode, target: Float[Tensor, "out d"], _: Float[Tensor, "out d"]) -> Coded:
            return _settle(encode, target, mix)

        return ldlq(weight, metric, slices, score, self.damping, flags, choose)


def _row_feedback(h_out: Float[Tensor, "out out"], damping: float) -> tuple[Float[Tensor, "out out"], float]:
    """`M - 1` of `h_out = M diag(s) M^T`, rows and columns in the order of the weight's rows; the damping that was needed."""
    order = h_out.diagonal().argsort(descending=True, stable=True).flip(0)  # the first to be rounded is the last
    factors = block_ldl(h_out, order[:, None], damping)
    mix = torch.empty_like(factors.lower)
    mix[order[:, None], order] = factors.lower.tril(-1)
    return mix, factors.damping


def _settle(encode: Encode, target: Float[Tensor, "out d"], mix: Float[Tensor, "out out"]) -> Coded:
    """Row r rounded at `target_r + sum_s mix_sr (target_s - value_s)`, where the s with `mix_sr != 0` come before it.

    All rows at once, with the values of the round before: each round settles at least one row more, and once nothing changes
    the codes are those of one row after the other. That takes some twenty rounds for hundreds of rows.
    """
    codes, values = encode(target)
    for _ in range(len(target) - 1):
        last = values
        codes, values = encode(torch.addmm(target.T, (target - last).T, mix).T)
        if torch.equal(values, last):
            break
    return codes, values
