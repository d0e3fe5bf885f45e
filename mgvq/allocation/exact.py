"""The least total loss under the budget: an integer programme (a multiple-choice knapsack), solved by HiGHS."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Int
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor

from mgvq.allocation.floors import Floors
from mgvq.errors import UserError
from mgvq.types import RateTable

_TIME_LIMIT = 1  # scipy's status


@dataclass(frozen=True, kw_only=True)
class Exact(Floors):
    """The optimum; a solution that is not proven to be within `gap` of it in time is an error, and never used."""

    distortion: Literal["measured", "gaussian"]
    """How losses are predicted: `measured` on fitted codebooks, or modelled as `score * 2^(-2 bits)`."""
    gap: float
    """The share of the total loss by which a solution may exceed the optimum, in [0, 1)."""
    time_limit: float
    """Seconds for the solver."""
    uses_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.distortion not in ("measured", "gaussian"):
            raise UserError(f"allocation.distortion must be measured or gaussian, got {self.distortion!r}")
        if not 0 <= self.gap < 1:
            raise UserError(f"allocation.gap must lie in [0, 1), got {self.gap!r}")
        if not self.time_limit > 0:
            raise UserError(f"allocation.time_limit must be > 0 seconds, got {self.time_limit!r}")
        super().__post_init__()

    def __call__(self, table: RateTable, budget_bits: int) -> Int[Tensor, "u"]:
        """Raises UserError where HiGHS runs out of time or fails."""
        legal = self.legal(table, budget_bits)
        table_groups, rates = legal.numpy().nonzero()
        bits, loss = table.bits.numpy().astype(np.int64), table.loss.double().numpy()
        # What a rate costs beyond the cheapest of its table group, over the common divisor: small whole numbers are exact in the
        # solver.
        cheapest = np.where(legal.numpy(), bits, bits.max()).min(1)
        extra, room = (bits - cheapest[:, None])[table_groups, rates], budget_bits - cheapest.sum()
        quantum = np.gcd.reduce(extra) or 1
        one_each = csr_array((np.ones(len(table_groups)), (table_groups, np.arange(len(table_groups)))))
        solved = milp(
            loss[table_groups, rates] / _scale(loss),
            integrality=np.ones(len(table_groups)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(extra[None] // quantum, -np.inf, room // quantum)],
            options={"time_limit": self.time_limit, "mip_rel_gap": self.gap},
        )
        if solved.status == _TIME_LIMIT:
            raise UserError(
                f"allocation.time_limit={self.time_limit:g} s did not bring {len(table.table_groups)} table groups within "
                f"allocation.gap={self.gap:g} of the optimum. Raise either, or take allocation=greedy."
            )
        if not solved.success or extra[solved.x > 0.5].sum() > room:
            raise UserError(f"allocation=exact: HiGHS failed ({solved.message}). Take allocation=greedy.")
        return torch.from_numpy(rates[solved.x > 0.5])


def _scale(loss: np.ndarray) -> float:
    """Return what the losses are divided by: HiGHS has absolute tolerances too, so that the optimum had better be 1 or more."""
    return max(loss.min(1).sum(), 1e-6 * loss.max()) or 1.0
