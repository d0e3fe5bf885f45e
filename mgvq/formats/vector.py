"""Vector codes, where each run of `d` input channels of a row is an index into a table of `k` centroids, or several."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mgvq.formats.packing import pack, packed_bytes, unpack

TABLES = ("fp16", "int8")


@dataclass(frozen=True)
class VectorWeight:
    """Codes and the tables that they point into.

    With `t` tables and codes of `s` stages there are t / s subspaces: vector v of a row is the sum over its stages i of an entry
    of table `(v % subspaces) * s + i`. One table is plain vector quantisation; t > 1 and s = 1 is product quantisation; t = s > 1
    is residual quantisation. The last vector of a row is padded where `in` is not a multiple of `d`; its code is stored and
    counted.
    """

    codes: Int[Tensor, "out vectors stages"]
    """Indices into the tables, integers of [0, k)."""
    table: Shaped[Tensor, "t k d"]
    """The tables in fp16 or int8; weights that share tables hold the same object."""
    num_in: int
    """Input channels of the weight."""
    step: Float[Tensor, "t"] | None = None
    """What the int8 centroids of each table are multiplied by, in fp16."""
    scale: Float[Tensor, ""] | None = None
    """What all vectors are multiplied by where layers share tables, in fp16."""

    format: ClassVar[str] = "vector"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.num_in

    def decode(self) -> Float[Tensor, "out in"]:
        """Return the weight in float32, exactly the same on every device."""
        return self.decoder()(self.tunable)

    @property
    def tunable(self) -> Mapping[str, Tensor]:
        stored = {"table": self.table, "step": self.step, "scale": self.scale}
        return {role: tensor for role, tensor in stored.items() if tensor is not None}

    @property
    def is_linear(self) -> bool:
        return self.step is None and self.scale is None

    def decoder(self) -> Callable[[Mapping[str, Tensor]], Float[Tensor, "out in"]]:
        _, num_vectors, stages = self.codes.shape
        num_tables, num_centroids, _ = self.table.shape
        subspace = torch.arange(num_vectors, device=self.codes.device) % (num_tables // stages)
        rows = [(subspace * stages + i) * num_centroids + self.codes[:, :, i].long() for i in range(stages)]

        def weight(tensors: Mapping[str, Tensor]) -> Float[Tensor, "out in"]:
            tables = centroids(tensors["table"], tensors.get("step")).flatten(0, 1)
            vectors = torch.zeros((), device=tables.device)
            for own in rows:
                vectors = vectors + torch.nn.functional.embedding(own, tables)
            weight = vectors.flatten(1)[:, : self.num_in]
            return weight if "scale" not in tensors else weight * tensors["scale"].float()

        return weight

    def tensors(self) -> Mapping[str, Tensor]:
        codes = pack(self.codes.flatten(), index_width(self.table.shape[1]))
        stored = {"codes": codes, "table": self.table, "step": self.step, "scale": self.scale}
        return {role: tensor for role, tensor in stored.items() if tensor is not None}

    def num_weights(self) -> Mapping[str, int]:
        return {"codes": math.prod(self.shape)}

    def settings(self) -> Mapping[str, Any]:
        return {"shape": list(self.shape), "stages": self.codes.shape[2]}

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], shape: list[int], stages: int) -> "VectorWeight":
        num_out, num_in = shape
        _, num_centroids, length = tensors["table"].shape
        sizes = num_out, -(-num_in // length), stages
        codes = unpack(tensors["codes"], index_width(num_centroids), sizes[0] * sizes[1] * sizes[2])
        return cls(codes.view(sizes), tensors["table"], num_in, tensors.get("step"), tensors.get("scale"))


def index_width(number: int) -> int:
    """The bits of an index into `number` entries."""
    return max(1, (number - 1).bit_length())


def codes_bits(shape: tuple[int, int], vector_length: int, num_centroids: int, stages: int = 1) -> int:
    """The exact size of a weight's packed codes in bits, tables not counted."""
    num_vectors = shape[0] * -(-shape[1] // vector_length)
    return 8 * packed_bytes(num_vectors * stages, index_width(num_centroids))


def table_bits(vector_length: int, num_centroids: int, table: str) -> int:
    """The exact size in bits of one table that is stored as `table` (one of TABLES)."""
    numbers = vector_length * num_centroids
    return 16 * numbers if table == "fp16" else 8 * numbers + 16


def to_vectors(weight: Float[Tensor, "out in"], vector_length: int) -> Float[Tensor, "out v d"]:
    """Cut the rows into runs of input channels, the last of which is padded with zeros."""
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % vector_length)).unflatten(1, (-1, vector_length))


def store_table(table: Float[Tensor, "k d"], kind: str) -> tuple[Shaped[Tensor, "k d"], Float[Tensor, ""] | None]:
    """Return the table as it is stored: fp16, or int8 between the largest magnitude and its negative, with the fp16 step.

    Raises ValueError for centroids beyond the range of fp16.
    """
    largest = table.abs().max()
    if not largest < torch.finfo(torch.float16).max:
        raise ValueError(f"centroids must stay below {torch.finfo(torch.float16).max:g} for fp16, got {float(largest):g}")
    if kind == "fp16":
        return table.half(), None
    step = (largest / 127).clamp(min=2.0**-24).half()
    return (table / step.float()).round().clamp(-127, 127).to(torch.int8), step


def centroids(table: Shaped[Tensor, "*t k d"], step: Float[Tensor, "*t"] | None) -> Float[Tensor, "*t k d"]:
    """Return what stored tables stand for, in float32."""
    return table.float() if step is None else table.float() * step.float()[..., None, None]
