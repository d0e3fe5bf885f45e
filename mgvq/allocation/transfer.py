"""The rule that another run found, carried over: which sorts of table groups got more bits there, and how many more."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.allocation.floors import ByWish
from mgvq.errors import UserError
from mgvq.types import RateTable

COLUMNS = ["tower", "kind", "depth", "quantile", "num_weights", "index_bits"]
Cell = tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True)
class Transfer(ByWish):
    """A table group wishes for the mean index bits that its cell has in the source.

    A cell is a tower, a layer kind, a range of depth and a range of the score's quantile in its tower. Where the source has no
    such table group, the depth is left out, then the kind, then the tower, then the quantile. Only differences between cells
    count, so that the source may have any mean rate; of the scores of the new model only the quantiles count, and the order of
    ties.
    """

    source: str
    """The `allocation.parquet` of a finished run."""
    depth_bins: int
    """The number of equal ranges of depth in a tower."""
    quantile_bins: int
    """The number of equal ranges of the score's quantile."""
    uses_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raises UserError for a source that cannot be read, before anything expensive."""
        for name in ("depth_bins", "quantile_bins"):
            bins = getattr(self, name)
            if not (type(bins) is int and bins >= 1):
                raise UserError(f"allocation.{name} must be a whole number >= 1, got {bins!r}")
        super().__post_init__()
        self._rule()

    def wishes(self, table: RateTable, budget_bits: int) -> Float[Tensor, "u"]:
        rule = self._rule()
        cells = [self._cells(u.tower, u.kind, u.depth, u.quantile) for u in table.table_groups]
        wish = [next(rule[cell] for cell in finest_first if cell in rule) for finest_first in cells]
        return torch.tensor(wish, dtype=torch.float64)

    def _rule(self) -> Mapping[Cell, float]:
        """Return the mean index bits over the weights of every cell of the source, the coarser ones too."""
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
        """Return the cells of a table group, from the narrowest to the whole model."""
        d, q = _bin(depth, self.depth_bins), _bin(quantile, self.quantile_bins)
        return [(tower, kind, d, q), (tower, kind, q), (tower, q), (q,), ()]


def _bin(value: float, bins: int) -> int:
    return min(int(value * bins), bins - 1)
