"""Reverse water-filling: `b_u = level + 1/2 log2(I_u / n_u)` minimises `sum I_u 2^(-2 b_u)` at `sum n_u b_u = B` (method 3.7)."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from mgvq.allocation.budget import check_positive, legal_rates, log_density, round_wishes
from mgvq.types import RateTable


@dataclass(frozen=True, kw_only=True)
class WaterFilling:
    """The optimum of the high-rate model, rounded to rates at the highest level that fits the budget in stored bits.

    Units at the lowest or the highest rate stay there while the level moves: that is the clipped problem, solved on the free set.
    The bits of tables change the level, not the order; `greedy` and `exact` weigh them. `min_bits`, `min_bits_kv`: see
    `budget.legal_rates`.
    """

    min_bits: float | None
    min_bits_kv: float | None
    uses_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(min_bits=self.min_bits, min_bits_kv=self.min_bits_kv)

    @property
    def distortion(self) -> None:
        return None

    def __call__(self, table: RateTable, budget_bits: int) -> Int[Tensor, "u"]:
        legal = legal_rates(table, budget_bits, self.min_bits, self.min_bits_kv)
        return round_wishes(table, log_density(table) / 2, legal, budget_bits)
