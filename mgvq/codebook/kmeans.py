"""k-means vector quantisation: runs of `vector_length` input channels are indices into learned centroids."""

from dataclasses import dataclass

from mgvq.codebook.layout import Layout
from mgvq.codebook.vector import VectorCodebook


@dataclass(frozen=True, kw_only=True)
class KMeans(VectorCodebook):
    """One table that minimises `sum_i min_k |x_i - C_k|^2`, weighted as `VectorCodebook` says (as GPTVQ has it)."""

    def layout(self, vector_length: int, num_centroids: int) -> Layout:
        return Layout(vector_length, num_centroids)
