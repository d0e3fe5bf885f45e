"""One rate for all layers: the highest whose stored bits, tables and scales included, fit the budget."""

from collections.abc import Sequence
from dataclasses import dataclass

from mgvq.errors import UserError
from mgvq.types import Codebook, Rate, Site

_MIN_USE = 0.75  # a rate that leaves more of the budget unused is not what was asked for


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """`tolerance`: by which share the stored bits may exceed the budget."""

    tolerance: float

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance <= 0.5:
            raise UserError(f"allocation.tolerance must lie in [0, 0.5], got {self.tolerance!r}")

    def __call__(self, sites: Sequence[Site], codebook: Codebook, bits_per_weight: float) -> Rate:
        num_weights = sum(s.num_weights for s in sites)
        cost = {rate: codebook.storage_bits(sites, rate) / num_weights for rate in codebook.rates()}
        legal = [rate for rate in cost if cost[rate] <= bits_per_weight * (1 + self.tolerance)]
        if not legal:
            cheapest = min(cost, key=lambda rate: cost[rate])
            raise UserError(
                f"budget.bits_per_weight={bits_per_weight:g} is below the smallest rate of this codebook, {cheapest.name}, which "
                f"stores {cost[cheapest]:.3f} bits a weight on these {len(sites)} layers. Raise the budget."
            )
        best = max(legal, key=lambda rate: (cost[rate], rate.size))
        over = min((r for r in cost if r not in legal), key=lambda rate: cost[rate], default=None)
        if over and cost[best] < _MIN_USE * bits_per_weight:
            raise UserError(
                f"budget.bits_per_weight={bits_per_weight:g} falls between two rates of this codebook: {best.name} stores "
                f"{cost[best]:.3f} bits a weight, {over.name} {cost[over]:.3f}. Ask for one of them."
            )
        return best
