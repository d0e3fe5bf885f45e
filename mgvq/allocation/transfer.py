"""The rule that another run found, carried over: which sorts of units got more bits there than others, and how many more."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from mgvq.allocation.budget import check_positive, legal_rates, round_wishes
from mgvq.errors import UserError
from mgvq.types import RateTable

COLUMNS = ["tower", "kind", "depth", "quantile", "num_weights", "index_bits"]
Cell = tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A unit wishes for the mean index bits of its cell in the source; the wishes are rounded at the level that meets the budget.

    `source`: allocation.parquet of a finished run. A cell is a tower, a layer kind, one of `depth_bins` equal ranges of depth and
    one of `quantile_bins` of the score's quantile in its tower. Where the source has no such unit, the depth is left out, then
    the kind, then the tower, then the quantile. Only differences between cells count, so the source may have any mean rate.
    Of the new model's own scores only the quantiles count, and the order of ties. `min_bits`, `min_bits_kv`: see
    `budget.legal_rates`.
    """

    source: str
    depth_bins: int
    quantile_bins: int
    min_bits: float | None
    min_bits_kv: float | None
    uses_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raises UserError for a source that cannot be read, before anything expensive."""
        for name in ("depth_bins", "quantile_bins"):
            bins = getattr(self, name)
            if not (type(bins) is int and bins >= 1):
                raise UserError(f"allocation.{name} must be a whole number >= 1, got {bins!r}")
        check_positive(min_bits=self.min_bits, min_bits_kv=self.min_bits_kv)
        self._rule()

    @property
    def distortion(self) -> None:
        return None

    def __call__(self, table: RateTable, budget_bits: int) -> Int[Tensor, "u"]:
        legal = legal_rates(table, budget_bits, self.min_bits, self.min_bits_kv)
        rule = self._rule()
        cells = [
            self._cells(table_group.tower, table_group.kind, table_group.depth, table_group.quantile)
            for table_group in table.table_groups
        ]
        wish = [next(rule[cell] for cell in finest_first if cell in rule) for finest_first in cells]
        return round_wishes(table, torch.tensor(wish, dtype=torch.float64), legal, budget_bits)

    def _rule(self) -> Mapping[Cell, float]:
        """Mean index bits over the weights of every cell of the source, the coarser ones too."""
        file = Path(self.source)
        if not file.is_file():
            raise UserError(f"allocation.source={self.source} is not a file; give the allocation.parquet of a finished run.")
        try:
            rows = pd.read_parquet(file, columns=COLUMNS)
        except (OSError, ValueError) as error:
            raise UserError(f"allocation.source={self.source} is no allocation.parquet of a finished run: {error}") from error
        if rows.empty:
            raise UserError(f"allocation.source={self.source} has no rows: that run allocated nothing.")
        weights, bits = defaultdict[Cell, float](float), defaultdict[Cell, float](float)
        for tower, kind, depth, quantile, num_weights, index_bits in rows[COLUMNS].itertuples(index=False):
            for cell in self._cells(tower, kind, depth, quantile):
                weights[cell] += num_weights
                bits[cell] += num_weights * index_bits
        return {cell: bits[cell] / weights[cell] for cell in weights}

    def _cells(self, tower: str, kind: str, depth: float, quantile: float) -> list[Cell]:
        """From the narrowest to the whole model."""
        d, q = _bin(depth, self.depth_bins), _bin(quantile, self.quantile_bins)
        return [(tower, kind, d, q), (tower, kind, q), (tower, q), (q,), ()]


def _bin(value: float, bins: int) -> int:
    return min(int(value * bins), bins - 1)
