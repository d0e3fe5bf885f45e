"""Channel slices as rows of vectors."""

from jaxtyping import Float
from torch import Tensor

from mgvq.formats.vector import to_vectors
from mgvq.protocols import FittedSlice


def columns_of(weight: Float[Tensor, "out in"], fitted: FittedSlice) -> Float[Tensor, "out v d"]:
    """The columns of a channel slice in float32, cut into vectors, the last of which is padded with zeros."""
    columns = weight[:, fitted.channel_slice.columns.to(weight.device).long()].float()
    return to_vectors(columns, fitted.codebook.vector_length)
