"""VPTQ's vectors: runs of `vector_length` output channels of one column are indices into learned centroids."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.codebook.vector import FittedTables, Layout, Source, VectorCodebook
from mgvq.errors import UserError
from mgvq.formats.columns import ColumnWeight
from mgvq.formats.vector import VectorWeight, codes_bits, table_bits, to_vectors
from mgvq.types import ChannelSlice, Rate


@dataclass(frozen=True, kw_only=True)
class FittedColumns:
    """The table of one piece, whose columns are rows of `transposed`. A column is rounded as a whole.

    That makes the vector of a second-order rounding one channel long: the error of a column counts with one number, so each of
    its vectors takes the nearest centroid, whatever the root (VPTQ's channel-independent optimisation; method 2.3).
    """

    transposed: FittedTables

    vector_length: ClassVar[int] = 1

    def encode(
        self, targets: Float[Tensor, "out v 1"], first: int, root: Float[Tensor, "1 1"] | None
    ) -> tuple[Int[Tensor, "runs v"], Float[Tensor, "out v 1"]]:
        """See `FittedCodebook`; the codes of a column are those of its runs of rows."""
        codes, values = self.transposed.encode(to_vectors(targets[:, :, 0].T, self.transposed.vector_length), 0, None)
        return codes.T, values.flatten(1)[:, : len(targets)].T[:, :, None]

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

    def weight(self, codes: Int[Tensor, "runs v"]) -> ColumnWeight:
        stored = self.transposed.weight(codes.T.contiguous())
        assert isinstance(stored, VectorWeight)
        return ColumnWeight(stored)


@dataclass(frozen=True, kw_only=True)
class Columns(VectorCodebook):
    """One table; a vector counts in the fit with (its channel's energy)^weight_power (method 2.3: VPTQ has 1)."""

    spans_rows: ClassVar[bool] = True
    can_be_refitted: ClassVar[bool] = False

    def layout(self, vector_length: int, num_centroids: int) -> Layout:
        return Layout(vector_length, num_centroids)

    def storage_bits(self, slices: Sequence[ChannelSlice], rate: Rate) -> int:
        layout = self.layouts()[rate]
        d, k = layout.vector_length, layout.num_centroids
        codes = sum(codes_bits((p.shape[1], p.shape[0]), d, k) for p in slices)
        scales = 16 * len(slices) if self.share != "layer" else 0
        return codes + scales + table_bits(d, k, self.table)

    def fit(
        self,
        name: str,
        weights: Sequence[Float[Tensor, "_ _"]],
        rate: Rate,
        importance: Sequence[Float[Tensor, "_"] | None],
        flags: list[str],
    ) -> Sequence[FittedColumns]:  # type: ignore[override]
        """See `VectorCodebook.fit`."""
        fitted = super().fit(name, weights, rate, importance, flags)
        return [FittedColumns(transposed=replace(f, num_in=len(w))) for f, w in zip(fitted, weights, strict=True)]

    def _source(self, weight: Float[Tensor, "out c"], channel_weight: Float[Tensor, "c"], vector_length: int) -> Source:
        alike = torch.ones(len(weight), device=weight.device)
        return replace(super()._source(weight.T, alike, vector_length), rows=channel_weight)
