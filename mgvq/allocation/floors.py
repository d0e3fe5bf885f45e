"""What the policies that give table groups different rates share: floors, and the rounding of wishes to rates."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from mgvq.allocation.budget import check_positive, legal_rates, round_wishes
from mgvq.types import RateTable


@dataclass(frozen=True, kw_only=True)
class Floors:
    """The index bits that every table group gets at least."""

    min_bits: float | None
    """Index bits that every table group gets at least; None: no floor."""
    min_bits_kv: float | None
    """The same for k_proj and v_proj, under grouped queries every row of which serves several heads; None: no floor."""

    def __post_init__(self) -> None:
        check_positive(min_bits=self.min_bits, min_bits_kv=self.min_bits_kv)

    def legal(self, table: RateTable, budget_bits: int) -> Bool[Tensor, "u r"]:
        """Which rates the floors allow; see `budget.legal_rates`."""
        return legal_rates(table, budget_bits, self.min_bits, self.min_bits_kv)


@dataclass(frozen=True, kw_only=True)
class ByWish(Floors, ABC):
    """A policy that wishes for index bits by score, without a look at losses; only the differences of wishes count.

    The wishes are rounded to rates at the highest level that meets the budget in stored bits (`budget.round_wishes`).
    """

    distortion: ClassVar[None] = None

    def __call__(self, table: RateTable, budget_bits: int) -> Int[Tensor, "u"]:
        legal = self.legal(table, budget_bits)
        return round_wishes(table, self.wishes(table, budget_bits), legal, budget_bits)

    @abstractmethod
    def wishes(self, table: RateTable, budget_bits: int) -> Float[Tensor, "u"]:
        """Return the index bits that each table group wishes for, in float64."""
