"""No compensation: every vector takes its nearest code."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from mgvq.compensation.vectors import columns_of
from mgvq.protocols import FittedSlice, TargetShift
from mgvq.types import Metric


@dataclass(frozen=True, kw_only=True)
class NoCompensation:
    """Each vector takes the code that is nearest as the codebook weighs its channels; metric and order are not looked at."""

    needs_metric: ClassVar[bool] = False
    needs_output_metric: ClassVar[bool] = False
    uses_score: ClassVar[bool] = False
    shift: ClassVar[TargetShift | None] = None

    def round(
        self,
        weight: Float[Tensor, "out in"],
        metric: Metric | None,
        slices: Sequence[FittedSlice],
        score: Float[Tensor, "in"],
        flags: list[str],
    ) -> Sequence[Tensor]:
        return [fitted.codebook.encode(columns_of(weight, fitted), 0, None)[0] for fitted in slices]
