"""Thresholds on the quantile of a table group's score put it into classes, and every class has its step from a base rate.

This is a reconstruction: what is known of MGVQ says mixed precision by sensitivity, and not by which rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.allocation.budget import log_density, parts, sizes
from mgvq.allocation.floors import ByWish
from mgvq.errors import UserError
from mgvq.types import RateTable


@dataclass(frozen=True, kw_only=True)
class Threshold(ByWish):
    """The base rate is the highest that fits the budget; what is left over lifts the table groups of highest score a weight."""

    thresholds: Sequence[float]
    """Shares of the weights, by ascending score a weight. A table group lies at the middle of its own share, and table groups of
    equal score at the middle of theirs."""
    steps: Sequence[float]
    """Index bits of each class from the base rate; only their differences count."""
    within: Literal["model", "layer"]
    """Which table groups are compared: all of the `model`, or those of one `layer`."""
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
        super().__post_init__()

    def wishes(self, table: RateTable, budget_bits: int) -> Float[Tensor, "u"]:
        levels = torch.tensor(self.thresholds, dtype=torch.float64)
        steps = torch.tensor(self.steps, dtype=torch.float64)
        return steps[torch.bucketize(self._quantiles(table), levels, right=True)]

    def _quantiles(self, table: RateTable) -> Float[Tensor, "u"]:
        density, weights = log_density(table), sizes(table)
        quantiles = torch.empty_like(density)
        for part in parts(table, self.within):
            d, w = density[part], weights[part]
            below, same = (compare(d, d[:, None]).double() @ w for compare in (torch.lt, torch.eq))
            quantiles[part] = (below + same / 2) / w.sum()
        return quantiles


def _rise(values: Sequence[float]) -> bool:
    return all(lower < upper for lower, upper in pairwise(values))
