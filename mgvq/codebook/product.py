"""Product quantisation: the vectors of a row take the tables of several subspaces in turn."""

from dataclasses import dataclass

from mgvq.codebook.layout import Layout
from mgvq.codebook.vector import VectorCodebook
from mgvq.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Product(VectorCodebook):
    """A run of `num_tables * vector_length` channels is cut into `num_tables` vectors, each with a table of its own.

    That is how RSAVQ does it: as many index bits as with one table, `num_tables` times the table bits, and each table knows its
    channels. A channel slice of fewer vectors than tables stores only those that it uses.
    """

    num_tables: int
    """The number of subspaces, 2 or more, each with one table."""

    def __post_init__(self) -> None:
        if not (isinstance(self.num_tables, int) and self.num_tables >= 2):
            raise UserError(f"codebook.num_tables must be a whole number >= 2, got {self.num_tables!r}; for one: codebook=kmeans")
        super().__post_init__()

    def layout(self, vector_length: int, num_centroids: int) -> Layout:
        return Layout(vector_length, num_centroids, subspaces=self.num_tables)
