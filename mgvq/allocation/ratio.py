"""RSAVQ's rule: bits in proportion to the logarithm of the score, `b = B log2(I + 1) / mean log2(I + 1)` (method 2.1)."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mgvq.allocation.budget import check_positive, legal_rates, log_density, per_weight, round_wishes, sizes
from mgvq.types import RateTable


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Rounded to the nearest rates, then shifted by the level that meets the budget in stored bits.

    I is the score a weight over its geometric mean: the "+ 1" makes the rule depend on the scale of I, which a sensitivity leaves
    open, so here the typical weight has I = 1. Not the optimum, even on paper (`water_filling` is). `min_bits`, `min_bits_kv`:
    see `budget.legal_rates`.
    """

    min_bits: float | None
    min_bits_kv: float | None

    def __post_init__(self) -> None:
        check_positive(min_bits=self.min_bits, min_bits_kv=self.min_bits_kv)

    @property
    def distortion(self) -> None:
        return None

    def __call__(self, table: RateTable, budget_bits: int) -> Int[Tensor, "u"]:
        legal = legal_rates(table, budget_bits, self.min_bits, self.min_bits_kv)
        logs, weights = torch.log2(log_density(table).exp2() + 1), sizes(table)
        wish = per_weight(table, budget_bits) * logs / (logs @ weights / weights.sum())
        return round_wishes(table, wish, legal, budget_bits)
