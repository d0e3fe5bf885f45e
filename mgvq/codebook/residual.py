"""Residual quantisation: a vector is the sum of a centroid and a centroid of what the first leaves over."""

from dataclasses import dataclass

from mgvq.codebook.layout import Layout
from mgvq.codebook.vector import VectorCodebook


@dataclass(frozen=True, kw_only=True)
class Residual(VectorCodebook):
    """Two stages of equal size: the second table is fitted to the rest of the first, and codes are chosen in that order.

    That is how VPTQ does it: tables of `2 k` centroids reach the index bits of `k^2`.
    """

    def layout(self, vector_length: int, num_centroids: int) -> Layout:
        return Layout(vector_length, num_centroids, stages=2)
