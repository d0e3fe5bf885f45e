"""Vector codes as AQLM holds them: each run of `in_group_size` input channels of a row is a sum of entries of tables.

A residual or additive codebook of two tables of 256 vectors of length 8 is AQLM's `2 x 8`, k-means vectors are its case of one
table. Nothing is fitted or rounded: the numbers of our `VectorWeight` are written under AQLM's names.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mgvq.checkpoint.load import StoredLayer
from mgvq.errors import UserError
from mgvq.export.codes import Coded, factor_of, narrow, refusal, tables_of, weight_of
from mgvq.formats.vector import VectorWeight

NAME = "AQLM"


def coded(layer: StoredLayer) -> Coded:
    """The layer's codes (signed, as AQLM stores them), tables and scales; decoding them in float32 gives the same bits.

    Raises UserError, with the layer and the reason, for what AQLM cannot hold.
    """
    weight, exponent = weight_of(layer, NAME, VectorWeight)
    num_out, num_in = weight.shape
    num_tables, _, length = weight.table.shape
    stages = weight.codes.shape[2]
    if num_tables != stages:
        raise refusal(layer, NAME, f"{num_tables // stages} tables take turns in a row (codebook=product), and AQLM's add up")
    if num_in % length:
        raise refusal(layer, NAME, f"its {num_in} input channels are no multiple of the vector length {length}")
    tables, bits = tables_of(weight)
    codes = weight.codes.long()
    codes = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
    scales = torch.full((num_out, 1, 1, 1), factor_of(weight, exponent))
    return Coded(
        {"in_group_size": length, "out_group_size": 1, "num_codebooks": stages, "nbits_per_codebook": bits},
        {
            "codes": codes.to(torch.int8 if bits <= 8 else torch.int16 if bits <= 16 else torch.int32),
            "codebooks": narrow(tables[:, :, None]),
            "scales": narrow(scales),
        },
    )


def configuration(layers: Mapping[str, Coded], others: Sequence[str]) -> dict[str, Any]:
    """AQLM's `quantization_config`; `others` are the linear layers that stay as they are.

    Raises UserError where layers differ in what AQLM says once for the whole model.
    """
    first, shape = next((name, dict(layer.shape)) for name, layer in layers.items())
    for name, layer in layers.items():
        if layer.shape != shape:
            raise UserError(
                f"AQLM has one vector length, number of tables and index width for the whole model, but {first} has "
                f"{_words(shape)} and {name} {_words(layer.shape)}. Quantise with one rate (allocation=uniform, one "
                "codebook.vector_length), or export with --to bf16."
            )
    return {"quant_method": "aqlm", **shape, "linear_weights_not_to_quantize": list(others)}


def _words(shape: Mapping[str, Any]) -> str:
    return f"length {shape['in_group_size']}, {shape['num_codebooks']} x {shape['nbits_per_codebook']} bits"
