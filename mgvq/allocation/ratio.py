"""RSAVQ's rule: bits in proportion to the logarithm of the score, `b = B log2(I + 1) / mean log2(I + 1)`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.allocation.budget import log_density, parts, per_weight, sizes
from mgvq.allocation.floors import ByWish
from mgvq.errors import UserError
from mgvq.types import RateTable


@dataclass(frozen=True, kw_only=True)
class Ratio(ByWish):
    """The rule rounded to the nearest rates, then shifted by the level that meets the budget in stored bits.

    I is the score a weight over its geometric mean: the "+ 1" makes the rule depend on the scale of I, which a sensitivity leaves
    open, so here the typical weight has I = 1. It is not the optimum, even on paper (`water_filling` is).
    """

    within: Literal["model", "layer"]
    """Where the mean of B bits is kept and I is relative to its mean: in every `layer`, as in RSAVQ, or in the whole `model`."""
    of: Literal["group", "channels"] = "group"
    """Whose logarithm it is: that of the mean score of a `group`, or the mean of the logarithms of its `channels` (RSAVQ)."""
    uses_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.within not in ("model", "layer"):
            raise UserError(f"allocation.within must be model or layer, got {self.within!r}")
        if self.of not in ("group", "channels"):
            raise UserError(f"allocation.of must be group or channels, got {self.of!r}")
        if self.of == "channels" and self.within != "layer":
            raise UserError("allocation.of=channels counts a channel's score by those of its layer: set allocation.within=layer")
        super().__post_init__()

    def wishes(self, table: RateTable, budget_bits: int) -> Float[Tensor, "u"]:
        density, weights = log_density(table), sizes(table)
        energies = torch.tensor([table_group.log_energy for table_group in table.table_groups], dtype=torch.float64)
        wish = torch.empty_like(density)
        for part in parts(table, self.within):
            own, share = density[part], weights[part] / weights[part].sum()
            logs = energies[part] if self.of == "channels" else torch.log2((own - own @ share).exp2() + 1)
            wish[part] = per_weight(table, budget_bits) * logs / (logs @ share)
        return wish
