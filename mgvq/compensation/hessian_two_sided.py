"""Second-order compensation in both directions: along the input channels of a row, and from row to row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.compensation.damping import check_damping
from mgvq.compensation.hessian import Hessian
from mgvq.compensation.ldl import block_ldl
from mgvq.compensation.ldlq import Choose, Coded, Encode
from mgvq.compensation.tiles import tile_by_tile
from mgvq.errors import UserError
from mgvq.protocols import FittedSlice, rows_together
from mgvq.types import Metric, Site


@dataclass(frozen=True, kw_only=True)
class HessianTwoSided(Hessian):
    """Two-sided block-LDL rounding in the Kronecker metric: a vector's error is corrected in later vectors and in other rows.

    With `h_in = L D L^T` as in `Hessian`, `h_out = M diag(s) M^T` and `Delta = W - W^`, row r of vector j is rounded at the
    (r, j) entry of `W + (M^T Delta L - Delta)`, which depends on vectors and rows that are done. What remains, `E = M^T Delta L`,
    costs `tr(h_out Delta h_in Delta^T) = sum_rj s_r |root_j E_rj|^2` (docs/method.md, eq. (two-sided-ldlq)): the weight of a row
    does not move its nearest code, so that the metric of a vector is that of `Hessian`, and an `h_out` of the identity gives the
    codes of `Hessian`.

    Codes that cover several rows (a trellis) are corrected from run to run of as many rows, in their order (`tile_by_tile`).

    Within a vector the row with the largest diagonal of `h_out` is rounded first, equal ones in their order. More is fed back
    than in one direction, so that targets leave the range of a small codebook sooner: it wants more damping than `Hessian`.

    Flags: those of `Hessian`, and `output_damping:<site>:<share>` where `h_out` needed more. Raises UserError for a metric
    without an output factor or with several input factors.
    """

    output_damping: float
    """The share of its diagonal that is added to `h_out`, in (0, 1], by `damping_of` as well."""
    needs_output_metric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping("output_damping", self.output_damping)

    def round(
        self,
        weight: Float[Tensor, "out in"],
        metric: Metric | None,
        slices: Sequence[FittedSlice],
        score: Float[Tensor, "in"],
        flags: list[str],
    ) -> Sequence[Tensor]:
        if (run := rows_together(slices[0].codebook)) == 1:
            return super().round(weight, metric, slices, score, flags)
        assert metric is not None, "the pipeline checks needs_metric"
        self._check(metric)
        priority, dampings = self.priority(score, slices), (self.damping, self.output_damping, self.damping_of)
        return tile_by_tile(weight, metric.to(weight.device), slices, priority, run, *dampings, flags)

    def met(
        self, weight: Float[Tensor, "out in"], metric: Metric, slices: Sequence[FittedSlice], score: Float[Tensor, "in"]
    ) -> Float[Tensor, "out in"]:
        if rows_together(slices[0].codebook) > 1:
            raise UserError(
                "compensation.tables=fed_back: codes that cover several rows have no tables to fit; set tables=weights"
            )
        return super().met(weight, metric, slices, score)

    def _check(self, metric: Metric) -> None:
        if metric.h_out is None or len(metric.h_in) > 1:
            raise UserError(
                "compensation=hessian_two_sided corrects errors from row to row, but this curvature has not one input and "
                "one output factor a layer: choose curvature=kronecker, or compensation=hessian"
            )

    def choice(self, metric: Metric, site: Site, flags: list[str]) -> Choose:
        self._check(metric)
        h_out = metric.dense_h_out()
        assert h_out is not None
        mix, damping = _row_feedback(h_out, self.output_damping, self.damping_of)
        if damping > self.output_damping:
            flags.append(f"output_damping:{site.name}:{damping:g}")
        return lambda encode, target, weight: _settle(encode, target, mix)


def _row_feedback(h_out: Float[Tensor, "out out"], damping: float, of: str) -> tuple[Float[Tensor, "out out"], float]:
    """Return `M - 1` of `h_out = M diag(s) M^T`, rows and columns in the order of the weight's rows, and the damping."""
    order = h_out.diagonal().argsort(descending=True, stable=True).flip(0)  # the row that is rounded first comes last
    factors = block_ldl(h_out, order[:, None], damping, of)
    mix = torch.empty_like(factors.lower)
    mix[order[:, None], order] = factors.lower.tril(-1)
    return mix, factors.damping


def _settle(encode: Encode, target: Float[Tensor, "out d"], mix: Float[Tensor, "out out"]) -> Coded:
    """Round row r at `target_r + sum_s mix_sr (target_s - value_s)`, where the rows s with `mix_sr != 0` come before it.

    All rows are rounded at once, with the values of the round before: each round settles at least one row more, and once nothing
    changes the codes are those of one row after the other. That takes some twenty rounds for hundreds of rows.
    """
    codes, values = encode(target)
    for _ in range(len(target) - 1):
        last = values
        codes, values = encode(torch.addmm(target.T, (target - last).T, mix).T)
        if torch.equal(values, last):
            break
    return codes, values
