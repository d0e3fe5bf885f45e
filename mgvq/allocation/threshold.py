"""Thresholds on the quantile of a unit's score put it into classes, and every class has its step from a base rate.

A reconstruction: what is known of MGVQ says mixed precision by sensitivity, not by which rule (method 1.7).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.allocation.budget import check_positive, layer_numbers, legal_rates, log_density, round_wishes, sizes
from mgvq.errors import UserError
from mgvq.types import RateTable


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """The base rate is the highest that fits the budget; what is left over lifts the units of highest score a weight.

    `thresholds`: shares of the weights, by ascending score a weight; a unit lies at the middle of its own share, units of equal
    score at the middle of theirs. `within`: the units that are compared, all of the `model` or those of one `layer`. `steps`:
    index bits of each class from the base rate; only their differences count. `min_bits`, `min_bits_kv`: see
    `budget.legal_rates`.
    """

    thresholds: Sequence[float]
    steps: Sequence[float]
    within: Literal["model", "layer"]
    min_bits: float | None
    min_bits_kv: float | None
    uses_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (_rise(self.thresholds) and all(0 < t < 1 for t in self.thresholds)):
            raise UserError(f"allocation.thresholds must rise and lie between 0 and 1, got {list(self.thresholds)}")
        if not (_rise(self.steps) and len(self.steps) == len(self.thresholds) + 1):
            raise UserError(
                f"allocation.steps must rise and be one more than the {len(self.thresholds)} thresholds, got {list(self.steps)}"
            )
        if self.within not in ("model", "layer"):
            raise UserError(f"allocation.within must be model or layer, got {self.within!r}")
        check_positive(min_bits=self.min_bits, min_bits_kv=self.min_bits_kv)

    @property
    def distortion(self) -> None:
        return None

    def __call__(self, table: RateTable, budget_bits: int) -> Int[Tensor, "u"]:
        legal = legal_rates(table, budget_bits, self.min_bits, self.min_bits_kv)
        levels = torch.tensor(self.thresholds, dtype=torch.float64)
        steps = torch.tensor(self.steps, dtype=torch.float64)
        return round_wishes(table, steps[torch.bucketize(self._quantiles(table), levels, right=True)], legal, budget_bits)

    def _quantiles(self, table: RateTable) -> Float[Tensor, "u"]:
        density, weights = log_density(table), sizes(table)
        layer = layer_numbers(table) if self.within == "layer" else torch.zeros(len(table.table_groups), dtype=torch.int64)
        quantiles = torch.empty_like(density)
        for i in layer.unique():
            d, w = density[layer == i], weights[layer == i]
            below, same = (compare(d, d[:, None]).double() @ w for compare in (torch.lt, torch.eq))
            quantiles[layer == i] = (below + same / 2) / w.sum()
        return quantiles


def _rise(values: Sequence[float]) -> bool:
    return all(lower < upper for lower, upper in pairwise(values))
