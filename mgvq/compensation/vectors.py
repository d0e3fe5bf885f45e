"""Pieces as rows of vectors."""

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.types import FittedPiece


def columns_of(weight: Float[Tensor, "out in"], fitted: FittedPiece) -> Float[Tensor, "out v d"]:
    """The columns of a piece, cut into vectors; the last one padded with zeros."""
    columns = weight[:, fitted.piece.columns.to(weight.device).long()].float()
    length = fitted.codebook.vector_length
    return torch.nn.functional.pad(columns, (0, -columns.shape[1] % length)).unflatten(1, (-1, length))
