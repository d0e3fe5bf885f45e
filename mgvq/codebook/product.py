"""Product quantisation: consecutive vectors of a row take several tables by turns."""

from dataclasses import dataclass

from mgvq.codebook.vector import Layout, VectorCodebook
from mgvq.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Product(VectorCodebook):
    """A run of `num_tables * vector_length` channels is cut into `num_tables` vectors, each with a table of its own.

    As RSAVQ does (method 2.1, 3.8): as many index bits as one table, `num_tables` times the table bits, and each table knows its
    channels. A piece of fewer vectors than tables stores only those that it uses.
    """

    num_tables: int

    def __post_init__(self) -> None:
        if not (isinstance(self.num_tables, int) and self.num_tables >= 2):
            raise UserError(f"codebook.num_tables must be a whole number >= 2, got {self.num_tables!r}; for one: codebook=kmeans")
        super().__post_init__()

    def layout(self, vector_length: int, num_centroids: int) -> Layout:
        return Layout(vector_length, num_centroids, subspaces=self.num_tables)
