"""Reverse water-filling: `b_u = level + 1/2 log2(I_u / n_u)` minimises `sum I_u 2^(-2 b_u)` at `sum n_u b_u = B`."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from mgvq.allocation.budget import log_density
from mgvq.allocation.floors import ByWish
from mgvq.types import RateTable


@dataclass(frozen=True, kw_only=True)
class WaterFilling(ByWish):
    """The optimum of the high-rate model (docs/method.md, eq. (water-filling)), rounded to rates.

    Table groups at the lowest or the highest rate stay there while the level moves: that is the clipped problem, solved on the
    free set. The bits of tables change the level, not the order; `greedy` and `exact` weigh them.
    """

    uses_score: ClassVar[bool] = True

    def wishes(self, table: RateTable, budget_bits: int) -> Float[Tensor, "u"]:
        return log_density(table) / 2
