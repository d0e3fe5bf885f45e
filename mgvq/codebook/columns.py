"""VPTQ's vectors: runs of `vector_length` output channels of one column are indices into learned centroids."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.codebook.layout import Layout
from mgvq.codebook.source import Source
from mgvq.codebook.tables import FittedTables
from mgvq.codebook.vector import VectorCodebook
from mgvq.errors import UserError
from mgvq.formats.columns import ColumnWeight
from mgvq.formats.vector import codes_bits, table_bits, to_vectors
from mgvq.types import ChannelSlice, Rate


@dataclass(frozen=True, kw_only=True)
class FittedColumns:
    """The tables of one channel slice, whose columns are the rows of `transposed`; a column is rounded as a whole.

    That makes the vector of a second-order rounding one channel long: the error of a column counts with one number, so that each
    of its vectors takes the nearest centroid whatever the root (VPTQ's channel-independent optimisation).
    """

    transposed: FittedTables
    """The tables of the transposed slice."""

    vector_length: ClassVar[int] = 1

    @property
    def rows_together(self) -> int:
        return self.transposed.vector_length

    def encode(
        self, targets: Float[Tensor, "out v 1"], first: int, root: Float[Tensor, "1 1"] | None
    ) -> tuple[Int[Tensor, "runs v stages"], Float[Tensor, "out v 1"]]:
        """See `FittedCodebook`; a column has one code for each run of rows."""
        codes, values = self.transposed.encode(to_vectors(targets[:, :, 0].T, self.transposed.vector_length), 0, None)
        return codes.transpose(0, 1), values.flatten(1)[:, : len(targets)].T[:, :, None]

    def rows(self, part: slice) -> "FittedColumns":
        """Raises UserError for a run of rows that begins or ends within a vector."""
        start, stop, _ = part.indices(self.transposed.num_in)
        length = self.transposed.vector_length
        if start % length or (stop % length and stop < self.transposed.num_in):
            raise UserError(
                f"codebook.vector_length={length} cuts rows {start} to {stop} of a layer, which have a metric of their own, "
                "in the middle of a vector: choose a length that divides them, or another curvature than guided"
            )
        channel_weight = self.transposed.channel_weight
        if channel_weight is not None:
            channel_weight = channel_weight[start // length : -(-stop // length)]
        return FittedColumns(transposed=replace(self.transposed, num_in=stop - start, channel_weight=channel_weight))

    def weight(self, codes: Int[Tensor, "runs v stages"]) -> ColumnWeight:
        return ColumnWeight(self.transposed.weight(codes.transpose(0, 1).contiguous()))


@dataclass(frozen=True, kw_only=True)
class Columns(VectorCodebook):
    """One table, or two that add up; a vector counts in the fit with (the importance of its channel)^weight_power, in VPTQ with a
    power of 1."""

    residual: bool = False
    """Whether rates of two tables are offered beside those of one, the second fitted to what the first leaves."""

    spans_rows: ClassVar[bool] = True
    can_be_refitted: ClassVar[bool] = False

    def layout(self, vector_length: int, num_centroids: int) -> Layout:
        return Layout(vector_length, num_centroids)

    def offers(self, vector_length: int, num_centroids: int) -> Sequence[Layout]:
        """One table, and where asked for two as well: of 4 centroids or more, since two of 2 are as large as one of 4."""
        two = [Layout(vector_length, num_centroids, stages=2)] if self.residual and num_centroids >= 4 else []
        return [self.layout(vector_length, num_centroids), *two]

    def storage_bits(self, slices: Sequence[ChannelSlice], rate: Rate) -> int:
        layout = self.layouts[rate]
        d, k = layout.vector_length, layout.num_centroids
        codes = sum(codes_bits((s.shape[1], s.shape[0]), d, k, layout.stages) for s in slices)
        scales = 16 * len(slices) if self.scaled else 0
        return codes + scales + layout.stages * table_bits(d, k, self.table)

    def _fitted(
        self,
        name: str,
        weights: Sequence[Float[Tensor, "_ _"]],
        rate: Rate,
        channel_weights: Sequence[Float[Tensor, "_"]],
        flags: list[str],
    ) -> Sequence[FittedColumns]:
        length = self.layouts[rate].vector_length
        sources = [
            replace(Source.of(w.T, torch.ones(len(w), device=w.device), length, scaled=self.scaled), row_weight=c)
            for w, c in zip(weights, channel_weights, strict=True)
        ]
        fitted = self.fit_tables(name, sources, [len(w) for w in weights], rate, flags)
        return [FittedColumns(transposed=f) for f in fitted]
