"""Vector codes: each run of `d` input channels of a row is one index into a table of `k` centroids."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.formats.packing import pack, packed_bytes, unpack


@dataclass(frozen=True)
class VectorWeight:
    """One layer's codes and the table they point into; layers that share a table hold the same tensor object.

    `scale` (fp16, one number) multiplies the centroids of a shared table; a layer with a table of its own has none.
    The last vector of a row is padded where `in` is not a multiple of `d`; its code is stored and counted.
    """

    codes: Int[Tensor, "out vectors"]
    table: Float[Tensor, "k d"]  # fp16
    num_in: int
    scale: Float[Tensor, ""] | None = None

    format: ClassVar[str] = "vector"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.num_in

    def decode(self) -> Float[Tensor, "out in"]:
        """float32; exact for every device."""
        weight = self.table.float()[self.codes.long()].flatten(1)[:, : self.num_in]
        return weight if self.scale is None else weight * self.scale.float()

    def tensors(self) -> Mapping[str, Tensor]:
        stored = {"codes": pack(self.codes.flatten(), index_width(len(self.table))), "table": self.table}
        return stored if self.scale is None else {**stored, "scale": self.scale}

    def settings(self) -> Mapping[str, Any]:
        return {"shape": list(self.shape)}

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], shape: list[int]) -> "VectorWeight":
        num_out, num_in = shape
        table = tensors["table"]
        num_vectors = -(-num_in // table.shape[1])
        codes = unpack(tensors["codes"], index_width(len(table)), num_out * num_vectors)
        return cls(codes.view(num_out, num_vectors), table, num_in, tensors.get("scale"))


def index_width(num_centroids: int) -> int:
    """Bits of an index into a table of `num_centroids`."""
    return max(1, (num_centroids - 1).bit_length())


def codes_bits(shape: tuple[int, int], vector_length: int, num_centroids: int) -> int:
    """Exact size of a layer's packed codes in bits, table not counted."""
    num_vectors = shape[0] * -(-shape[1] // vector_length)
    return 8 * packed_bytes(num_vectors, index_width(num_centroids))


def table_bits(vector_length: int, num_centroids: int) -> int:
    """Exact size of a table of fp16 centroids in bits."""
    return 16 * vector_length * num_centroids


def to_vectors(weight: Float[Tensor, "out in"], vector_length: int) -> Float[Tensor, "n d"]:
    """Rows cut into runs of input channels, the last padded with zeros: (out * ceil(in / d), d)."""
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % vector_length)).view(-1, vector_length)
