"""Second-order compensation: the error of what is rounded is corrected in what is still free (LDLQ; GPTQ; method 2.0, 3.9)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from mgvq.compensation.damping import check_damping
from mgvq.compensation.ldlq import ldlq
from mgvq.protocols import FittedSlice, TargetShift
from mgvq.types import Metric


@dataclass(frozen=True, kw_only=True)
class Hessian:
    """One-sided block-LDL rounding: vectors one after the other, each in the exact metric of its block.

    The vector with the most sensitive channels is rounded first, so that all others can make up for its error (GPTQ's act-order
    where the sensitivity is gram_diag); equal scores: in the order of the channels. With `H = L D L^T` in the reverse of that
    order and `Delta = W - W^`, vector j is rounded at `W_j + sum_{i>j} Delta_i L_ij` in the metric `D_j`, and `tr(Delta H
    Delta^T)` is the sum of what these roundings cost. The output factor of the metric does not change the feedback (method 3.9
    v) and is not looked at.

    Flags: `damping:<site>:<share>` where more damping was needed, `dead_channels:<site>:<number>` of inputs that were always
    zero (their weights are rounded to nearest).
    """

    damping: float  # share of the mean diagonal that is added to it
    needs_metric: ClassVar[bool] = True
    needs_output_metric: ClassVar[bool] = False
    uses_score: ClassVar[bool] = True
    corrects_rows: ClassVar[bool] = False
    shift: ClassVar[TargetShift | None] = None

    def __post_init__(self) -> None:
        check_damping("damping", self.damping)

    def round(
        self,
        weight: Float[Tensor, "out in"],
        metric: Metric | None,
        slices: Sequence[FittedSlice],
        score: Float[Tensor, "in"],
        flags: list[str],
    ) -> Sequence[Tensor]:
        assert metric is not None, "the pipeline checks needs_metric"
        return ldlq(weight, metric, slices, score, self.damping, flags, lambda encode, target, _: encode(target))
