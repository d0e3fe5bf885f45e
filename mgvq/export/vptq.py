"""Vector codes as VPTQ holds them: each run of output channels of a column is an index into a table, or into two that add up."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int, Int32
from torch import Tensor

from mgvq.checkpoint.load import StoredLayer
from mgvq.export.codes import Coded, factor_of, narrow, refusal, tables_of, weight_of
from mgvq.formats.columns import ColumnWeight
from mgvq.formats.packing import MAX_WIDTH, pack

NAME = "VPTQ"
_WORD = 32  # bits of the integers that indices are packed into


def coded(layer: StoredLayer) -> Coded:
    """The layer's packed indices and tables, and a scale a column where it has one; decoded in float32 they are the same bits.

    Raises UserError, with the layer and the reason, for what VPTQ cannot hold.
    """
    weight, exponent = weight_of(layer, NAME, ColumnWeight)
    vectors = weight.transposed
    num_out, num_in = weight.shape
    num_tables, _, length = vectors.table.shape
    stages = vectors.codes.shape[2]
    tables, bits = tables_of(vectors)
    if num_tables != stages or stages > 2:
        raise refusal(layer, NAME, f"it has {num_tables} tables and {stages} stages, and VPTQ's are one, or two that add up")
    if not num_in * stages * bits >= _WORD or stages * bits > MAX_WIDTH:
        raise refusal(layer, NAME, f"{num_in} indices of {stages} x {bits} bits are none that its reader unpacks")
    indices = sum(codes.int() << bits * stage for stage, codes in enumerate(vectors.codes.unbind(2)))
    factor = factor_of(vectors, exponent)
    tensors = {
        "indices": _packed(torch.as_tensor(indices).T, stages * bits)[None],
        "centroids.weight": narrow(tables[:1].flatten(1)),
    }
    if stages == 2:
        tensors["res_centroids.weight"] = narrow(tables[1:].flatten(1))
    if factor != 1:
        tensors["weight_scale"] = narrow(torch.full((num_in,), factor))
        tensors["weight_bias"] = torch.zeros(num_in, dtype=torch.float16)
    shape = {
        "in_features": num_in,
        "out_features": num_out,
        "vector_lens": [-1, length],
        "num_centroids": [-1, 2**bits],
        "num_res_centroids": [-1, 2**bits if stages == 2 else -1],
        "group_num": 1,
        "group_size": num_in,
        "outlier_size": 0,
        "indices_as_float": False,
        "is_indice_packed": True,
        "enable_norm": factor != 1,
        "enable_perm": False,
    }
    return Coded(shape, tensors)


def configuration(layers: Mapping[str, Coded], others: Sequence[str]) -> dict[str, Any]:
    """VPTQ's `quantization_config`; `others` are the linear layers that stay as they are."""
    described = {name: dict(layer.shape) for name, layer in layers.items()}
    return {"quant_method": "vptq", "config_for_layers": described, "modules_to_not_convert": list(others)}


def _packed(indices: Int[Tensor, "vectors in"], width: int) -> Int32[Tensor, "vectors words"]:
    """Each row of indices without gaps, the lowest bit first, filled up to whole words."""
    rows = torch.stack([pack(row, width) for row in indices])
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % (_WORD // 8))).view(torch.int32)
