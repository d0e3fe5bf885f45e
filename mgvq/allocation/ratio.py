"""RSAVQ's rule: bits in proportion to the logarithm of the score, `b = B log2(I + 1) / mean log2(I + 1)` (method 2.1)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from mgvq.allocation.budget import check_positive, layer_numbers, legal_rates, log_density, per_weight, round_wishes, sizes
from mgvq.errors import UserError
from mgvq.types import RateTable


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Rounded to the nearest rates, then shifted by the level that meets the budget in stored bits.

    `within`: the mean of B bits is that of every `layer`, as in RSAVQ, or of the whole `model`. I is the score a weight over its
    geometric mean there: the "+ 1" makes the rule depend on the scale of I, which a sensitivity leaves open, so here the typical
    weight has I = 1. Not the optimum, even on paper (`water_filling` is). `min_bits`, `min_bits_kv`:
    see `budget.legal_rates`.
    """

    within: Literal["model", "layer"]
    min_bits: float | None
    min_bits_kv: float | None
    uses_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.within not in ("model", "layer"):
            raise UserError(f"allocation.within must be model or layer, got {self.within!r}")
        check_positive(min_bits=self.min_bits, min_bits_kv=self.min_bits_kv)

    @property
    def distortion(self) -> None:
        return None

    def __call__(self, table: RateTable, budget_bits: int) -> Int[Tensor, "u"]:
        legal = legal_rates(table, budget_bits, self.min_bits, self.min_bits_kv)
        density, weights = log_density(table), sizes(table)
        part = layer_numbers(table) if self.within == "layer" else torch.zeros(len(table.table_groups), dtype=torch.int64)
        wish = torch.empty_like(density)
        for i in part.unique():
            own, share = density[part == i], weights[part == i] / weights[part == i].sum()
            logs = torch.log2((own - own @ share).exp2() + 1)
            wish[part == i] = per_weight(table, budget_bits) * logs / (logs @ share)
        return round_wishes(table, wish, legal, budget_bits)
