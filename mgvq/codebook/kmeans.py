"""k-means vector quantisation: runs of `vector_length` input channels are indices into learned centroids."""

from dataclasses import dataclass

from mgvq.codebook.vector import Layout, VectorCodebook


@dataclass(frozen=True, kw_only=True)
class KMeans(VectorCodebook):
    """One table: `min_C sum_i min_k |x_i - C_k|^2`, weighted as `VectorCodebook` says (method 2.4, 3.11)."""

    def layout(self, vector_length: int, num_centroids: int) -> Layout:
        return Layout(vector_length, num_centroids)
