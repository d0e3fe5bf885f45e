"""The tables of one rate of a vector codebook: how many there are, how large they are, and what they are called."""

from collections.abc import Sequence
from dataclasses import dataclass

from mgvq.formats.vector import codes_bits, index_width, table_bits
from mgvq.types import ChannelSlice


@dataclass(frozen=True, slots=True)
class Layout:
    """The tables of one rate. The vectors of a row take the subspaces in turn, and a vector is a sum over stages."""

    vector_length: int
    """Input channels in a vector."""
    num_centroids: int
    """Centroids in each table."""
    subspaces: int = 1
    """Subspaces: vector v of a row uses the tables of subspace `v % subspaces`."""
    stages: int = 1
    """Tables of a subspace, whose centroids add up."""

    @property
    def index_bits(self) -> float:
        """Index bits of a weight."""
        return self.stages * index_width(self.num_centroids) / self.vector_length

    @property
    def name(self) -> str:
        """`2x16`: vectors of 2, 16 centroids; `3x2x16`: three subspaces of such tables; `4x16+16`: two stages."""
        sizes = "+".join([str(self.num_centroids)] * self.stages)
        return f"{self.subspaces}x{self.vector_length}x{sizes}" if self.subspaces > 1 else f"{self.vector_length}x{sizes}"

    def num_subspaces(self, widths: Sequence[int]) -> int:
        """The subspaces that slices of so many columns use and store: those of few vectors do not come to the last ones."""
        return min(self.subspaces, max(-(-width // self.vector_length) for width in widths))

    def storage_bits(self, slices: Sequence[ChannelSlice], table: str) -> int:
        """Exact bits of the codes of all slices and of the tables that they share, stored as `table` (one of `TABLES`)."""
        codes = sum(codes_bits(s.shape, self.vector_length, self.num_centroids, self.stages) for s in slices)
        tables = self.num_subspaces([s.shape[1] for s in slices]) * self.stages
        return codes + tables * table_bits(self.vector_length, self.num_centroids, table)
