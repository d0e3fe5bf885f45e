"""One rate for all table groups: the highest that fits the budget in stored bits; or two, blind to scores."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from mgvq.allocation.budget import below_smallest, per_weight
from mgvq.errors import UserError
from mgvq.types import RateTable

_MIN_USE = 0.75  # a rate that leaves more of the budget unused is not what was asked for


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Gives all table groups the rate of the most index bits whose stored bits, tables and scales included, fit the budget."""

    tolerance: float
    """The share by which the stored bits may exceed the budget, in [0, .5]."""
    spread: bool
    """True: the budget is met between two rates. All table groups take the lower, and as many as fit, evenly spread over the
    model, the higher, so that the tables of many channel groups are paid for without a look at their scores."""

    distortion: ClassVar[None] = None
    uses_score: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance <= 0.5:
            raise UserError(f"allocation.tolerance must lie in [0, 0.5], got {self.tolerance!r}")
        if not isinstance(self.spread, bool):
            raise UserError(f"allocation.spread must be true or false, got {self.spread!r}")

    def __call__(self, table: RateTable, budget_bits: int) -> Int[Tensor, "u"]:
        """Raises UserError for a budget below the smallest rate, or far between two rates."""
        costs: list[int] = table.bits.sum(0).tolist()
        legal = [r for r, cost in enumerate(costs) if cost <= budget_bits * (1 + self.tolerance)]
        if not legal:
            least = min(range(len(costs)), key=costs.__getitem__)
            raise below_smallest(table, budget_bits, table.rates[least].name, costs[least])
        best = max(legal, key=lambda r: (table.rates[r].index_bits, costs[r]))
        over = min((r for r in range(len(costs)) if r not in legal), key=costs.__getitem__, default=None)
        if self.spread and over is not None:
            limit = int(budget_bits * (1 + self.tolerance))
            return best + (over - best) * _spread(table.bits[:, best], table.bits[:, over], limit)
        if over is not None and costs[best] < _MIN_USE * budget_bits:
            raise UserError(
                f"budget.bits_per_weight={per_weight(table, budget_bits):.4g} falls between two rates of this codebook: "
                f"{table.rates[best].name} stores {per_weight(table, costs[best]):.3f} bits a weight, {table.rates[over].name} "
                f"{per_weight(table, costs[over]):.3f}. Ask for one of them."
            )
        return torch.full((len(table.table_groups),), best)


def _spread(low: Int[Tensor, "u"], high: Int[Tensor, "u"], budget_bits: int) -> Int[Tensor, "u"]:
    """Return 1 for the table groups that take the higher rate: as many as fit, at even distances."""
    places, chosen = torch.arange(len(low)), torch.zeros(len(low), dtype=torch.int64)
    for number in range(len(low), 0, -1):
        chosen = ((places + 1) * number // len(low) > places * number // len(low)).long()
        if int(torch.where(chosen.bool(), high, low).sum()) <= budget_bits:
            return chosen
    return torch.zeros_like(chosen)
