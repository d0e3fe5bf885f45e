"""Upgrades by the loss that they save for each stored bit, along the lower convex hull of every table group."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Bool, Int
from torch import Tensor

from mgvq.allocation.budget import climb, hull, slope
from mgvq.allocation.floors import Floors
from mgvq.errors import UserError
from mgvq.types import RateTable


@dataclass(frozen=True, kw_only=True)
class Greedy(Floors):
    """The optimum where the budget ends with an upgrade; elsewhere worse by no more than the upgrade that did not fit."""

    distortion: Literal["measured", "gaussian"]
    """How losses are predicted: `measured` on fitted codebooks, or modelled as `score * 2^(-2 bits)`."""
    uses_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.distortion not in ("measured", "gaussian"):
            raise UserError(f"allocation.distortion must be measured or gaussian, got {self.distortion!r}")
        super().__post_init__()

    def __call__(self, table: RateTable, budget_bits: int) -> Int[Tensor, "u"]:
        legal = self.legal(table, budget_bits)
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
