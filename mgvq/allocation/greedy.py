"""Upgrades by the loss they save for each stored bit, along the lower convex hull of every unit (method 3.7)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Bool, Int
from torch import Tensor

from mgvq.allocation.budget import check_positive, climb, hull, legal_rates, slope
from mgvq.errors import UserError
from mgvq.types import RateTable


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """The optimum at every budget where an upgrade ends; elsewhere no worse than that by more than the upgrade that did not fit.

    `distortion`: how the losses are predicted, measured on fitted codebooks or modelled as `score * 2^(-2 bits)`. `min_bits`,
    `min_bits_kv`: see `budget.legal_rates`.
    """

    distortion: Literal["measured", "gaussian"]
    min_bits: float | None
    min_bits_kv: float | None
    uses_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.distortion not in ("measured", "gaussian"):
            raise UserError(f"allocation.distortion must be measured or gaussian, got {self.distortion!r}")
        check_positive(min_bits=self.min_bits, min_bits_kv=self.min_bits_kv)

    def __call__(self, table: RateTable, budget_bits: int) -> Int[Tensor, "u"]:
        legal = legal_rates(table, budget_bits, self.min_bits, self.min_bits_kv)
        bits, loss = table.bits.tolist(), table.loss.tolist()
        ladders = [hull(*table_group) for table_group in zip(bits, loss, legal.tolist(), strict=True)]
        choice = climb(table, ladders, lambda u, lower, upper: -slope(bits[u], loss[u], lower, upper), budget_bits)
        return _spend(table, choice, legal, budget_bits)


def _spend(table: RateTable, choice: Int[Tensor, "u"], legal: Bool[Tensor, "u r"], budget_bits: int) -> Int[Tensor, "u"]:
    """Spend what is left on the single change that saves most, on the hull or not, until none fits."""
    while True:
        now = choice[:, None]
        extra, saved = table.bits - table.bits.gather(1, now), table.loss.gather(1, now) - table.loss
        left = budget_bits - table.bits.gather(1, now).sum()
        saved = saved.masked_fill(~legal | (extra > left), 0)
        if saved.max() <= 0:
            return choice
        table_group, rate = (saved == saved.max()).nonzero()[0]
        choice = choice.index_fill(0, table_group, rate.item())
