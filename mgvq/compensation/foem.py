"""Second-order compensation that is shrunk towards the weights as they were (FOEM; method 2.7, 3.9 vii)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from mgvq.compensation.damping import check_damping
from mgvq.compensation.ldlq import ldlq
from mgvq.errors import UserError
from mgvq.protocols import FittedSlice, TargetShift
from mgvq.types import Metric


@dataclass(frozen=True, kw_only=True)
class Foem:
    """`Hessian` with `(1 - beta)` times its correction: vector j is rounded at `W_j + (1 - beta) sum_{i>j} Delta_i L_ij`.

    What FOEM adds as a first-order term, `beta (W' - W) H_FF` of the corrected weights W', is no gradient of the layer's
    quadratic: after the best correction that is zero. Its effect is this shrinkage, a trust region for the quadratic model.
    `beta` 0 is `compensation=hessian`; 1 is plain rounding, each vector in the metric of its block. Flags: those of `Hessian`.
    """

    damping: float  # share of the mean diagonal that is added to it
    beta: float  # share of the correction that is taken back
    needs_metric: ClassVar[bool] = True
    needs_output_metric: ClassVar[bool] = False
    uses_score: ClassVar[bool] = True
    corrects_rows: ClassVar[bool] = False
    shift: ClassVar[TargetShift | None] = None

    def __post_init__(self) -> None:
        check_damping("damping", self.damping)
        if not 0 <= self.beta <= 1:
            raise UserError(f"compensation.beta must lie in [0, 1], got {self.beta!r}")

    def round(
        self,
        weight: Float[Tensor, "out in"],
        metric: Metric | None,
        slices: Sequence[FittedSlice],
        score: Float[Tensor, "in"],
        flags: list[str],
    ) -> Sequence[Tensor]:
        assert metric is not None, "the pipeline checks needs_metric"
        return ldlq(
            weight, metric, slices, score, self.damping, flags, lambda encode, target, w: encode(target.lerp(w, self.beta))
        )
