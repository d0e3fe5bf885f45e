"""What the writers of other packages' codes have in common: which layers they can take, and exact numbers in few bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from mgvq.checkpoint.load import StoredLayer
from mgvq.errors import UserError
from mgvq.formats.columns import ColumnWeight
from mgvq.formats.exponent import ExponentWeight
from mgvq.formats.vector import VectorWeight, centroids, index_width

# Why no package of vector codes can hold a layer of another format. What it can hold stands with its writer.
_REASONS = {
    "rotated": "it is rotated (transform=hadamard), and a reader would have to turn its inputs or outputs",
    "grouped": "its channels are in groups with tables of their own, and a layer has one set of tables there",
    "outliers": "it keeps outliers exactly (outliers=N), which have no place there",
    "trellis": "trellis codes (codebook=trellis) are no indices into a table",
    "lattice": "lattice codes (codebook=lattice) are no indices into a table that is stored",
    "scalar": "scalar codes (codebook=scalar) are no vectors",
    "grid": "codes on a grid (codebook=grid, scaled_grid) are no vectors",
}
_ALONG = {"vector": "along the input channels (codebook=columns has the others)", "columns": "along the output channels"}


@dataclass(frozen=True)
class Coded:
    """One layer as another package holds it."""

    shape: Mapping[str, Any]
    """What that package's configuration says of the layer."""
    tensors: Mapping[str, Tensor]
    """Its tensors by the names that the package's layer has for them."""


def weight_of(layer: StoredLayer, to: str, wanted: type[VectorWeight] | type[ColumnWeight]) -> tuple[Any, int]:
    """The layer as `wanted`, and the power of two that it is multiplied by. Raises UserError for a layer of another format."""
    name, settings = layer.format, dict(layer.settings)
    exponent = 0
    if name == ExponentWeight.format:
        exponent, settings = int(settings["exponent"]), dict(settings["plain"])
        name = settings.pop("format")
    if name != wanted.format:
        why = f"its vectors lie {_ALONG[name]}, and those of {to} the other way" if name in _ALONG else _REASONS[name]
        raise refusal(layer, to, why)
    return wanted.load(layer.tensors, **settings), exponent


def refusal(layer: StoredLayer, to: str, why: str) -> UserError:
    """The error of a layer that `to` cannot hold."""
    return UserError(f"layer {layer.name} cannot be written for {to}: {why}. --to bf16 writes any checkpoint, decoded.")


def tables_of(weight: VectorWeight) -> tuple[Float[Tensor, "t k d"], int]:
    """The tables in float32, filled up with zeros to a power of two, and the bits of an index into one."""
    bits = index_width(weight.table.shape[1])
    tables = centroids(weight.table, weight.step)
    return torch.nn.functional.pad(tables, (0, 0, 0, 2**bits - tables.shape[1])), bits


def factor_of(weight: VectorWeight, exponent: int) -> float:
    """What the decoded vectors are multiplied by; 1 where the layer has neither a scale of its own nor an exponent."""
    return (1.0 if weight.scale is None else float(weight.scale)) * 2.0**exponent


def narrow(tensor: Shaped[Tensor, "*sizes"]) -> Shaped[Tensor, "*sizes"]:
    """The tensor in 16 bits where no number changes by that, else as it is."""
    if tensor.dtype == torch.float32:
        for dtype in (torch.float16, torch.bfloat16):
            if torch.equal(tensor.to(dtype).float(), tensor):
                return tensor.to(dtype)
    return tensor
