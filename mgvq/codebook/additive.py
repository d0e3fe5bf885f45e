"""Additive quantisation: a vector is a sum of centroids, one of each table, whose codes are looked for together (AQLM)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from mgvq.codebook.layout import Layout
from mgvq.codebook.tables import FittedTables
from mgvq.codebook.vector import VectorCodebook
from mgvq.errors import UserError
from mgvq.types import Rate


@dataclass(frozen=True, kw_only=True)
class Additive(VectorCodebook):
    """`num_tables` tables of equal size, stored as those of `residual`; a beam search finds the codes of a vector.

    Tables are fitted one to what those before it leave, as AQLM begins (Egiazarian et al. 2024); `refit=closed_form` moves them
    all together, and `compensation=coordinate_descent` is the search over the codes of a row. Vectors whose channels count
    unequally without a metric (`weight_power`) take their codes table after table.
    """

    num_tables: int
    """The number of tables, 2 or more."""
    beam: int
    """How many beginnings of a vector's codes are kept, 1 or more: 1 is the greedy choice, improved code by code."""

    def __post_init__(self) -> None:
        if not (isinstance(self.num_tables, int) and self.num_tables >= 2):
            raise UserError(f"codebook.num_tables must be a whole number >= 2, got {self.num_tables!r}; for one: codebook=kmeans")
        if not (isinstance(self.beam, int) and self.beam >= 1):
            raise UserError(f"codebook.beam must be a whole number >= 1, got {self.beam!r}")
        super().__post_init__()

    def layout(self, vector_length: int, num_centroids: int) -> Layout:
        return Layout(vector_length, num_centroids, stages=self.num_tables)

    def _fitted(
        self,
        name: str,
        weights: Sequence[Float[Tensor, "_ _"]],
        rate: Rate,
        channel_weights: Sequence[Float[Tensor, "_"]],
        flags: list[str],
    ) -> Sequence[FittedTables]:
        return [replace(f, beam=self.beam) for f in super()._fitted(name, weights, rate, channel_weights, flags)]  # type: ignore[type-var]
