"""The token embedding and the head on a grid a row, for the bytes of the whole model: no method, no budget, no layer in scope."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mgvq.codebook.scalar import Scalar
from mgvq.errors import UserError
from mgvq.formats.scalar import ScalarWeight
from mgvq.types import Rate

_CLIP = {8: "min_max", 4: "mse"}  # how the range of a row is found, by bits: of 256 levels hardly any is wasted
_ROWS = 4096  # at a time


def embeddings(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of the token embedding and of the head by the names of their modules; one where they are tied."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = {id(end.weight) for end in ends if end is not None}
    return {name.removesuffix(".weight"): p for name, p in model.named_parameters() if id(p) in weights}


@torch.inference_mode()
def round_embeddings(model: PreTrainedModel, bits: int) -> Mapping[str, ScalarWeight]:
    """What `embeddings` are stored as: codes of `bits` (8 or 4), an fp16 scale and a zero point for each row.

    Raises UserError for weights that are not finite or too large for fp16 scales.
    """
    return {name: _rounded(name, weight, bits) for name, weight in embeddings(model).items()}


def embedding_storage_bits(model: PreTrainedModel, bits: int) -> int:
    """The exact bits of `round_embeddings`, from the shapes alone."""
    return sum(ScalarWeight.storage_bits((len(w), w.shape[1]), bits, w.shape[1]) for w in embeddings(model).values())


def _rounded(name: str, weight: Tensor, bits: int) -> ScalarWeight:
    codebook, rate = Scalar(group_size=None, clip=_CLIP[bits]), Rate(f"int{bits}", float(bits))
    parts = []
    for rows in weight.detach().split(_ROWS):
        try:
            (fitted,) = codebook.fit(name, [rows.float()], rate, [None], [])
        except ValueError as error:
            raise UserError(f"embedding_bits: {name} cannot be rounded: {error}") from error
        parts.append(fitted.weight(fitted.encode(rows.float()[:, :, None], 0, None)[0]))
    codes, zeros, scales = (torch.cat([getattr(part, key) for part in parts]) for key in ("codes", "zeros", "scales"))
    return ScalarWeight(codes, zeros, scales, bits, weight.shape[1])
