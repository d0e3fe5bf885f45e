"""Vector codes, where each run of `d` input channels of a row is an index into a table of `k` centroids, or several."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from mgvq.formats.base import Stored
from mgvq.formats.fit import check_packed, check_roles, check_tensor, check_whole, rows_and_columns
from mgvq.formats.packing import pack, packed_bytes, unpack
from mgvq.kernels.gather import multiply_rows
from mgvq.kernels.look_up import contributions, look_up

TABLES = ("fp16", "int8")
_LOOKED_UP = 2**12  # centroids up to which a token's products with all of them are worth computing


@dataclass(frozen=True)
class VectorWeight(Stored):
    """Codes and the tables that they point into.

    With `t` tables and codes of `s` stages there are t / s subspaces: vector v of a row is the sum over its stages i of an entry
    of table `(v % subspaces) * s + i`. One table is plain vector quantisation; t > 1 and s = 1 is product quantisation; t = s > 1
    is residual quantisation. The last vector of a row is padded where `in` is not a multiple of `d`; its code is stored and
    counted.
    """

    codes: Integer[Tensor, "out vectors stages"]
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
    def check(cls, tensors: Mapping[str, Tensor], shape: list[int], stages: int) -> None:
        """Raises ValueError where the tensors are not those of a weight with these settings, or a code has no centroid."""
        num_out, num_in = rows_and_columns(shape)
        check_whole(stages=stages)
        check_roles(tensors, ("codes", "table"), ("step", "scale"))
        table = tensors["table"]
        if table.ndim != 3 or 0 in table.shape or len(table) % stages:
            raise ValueError(
                f"table is {tuple(table.shape)} instead of tables x centroids x length, a multiple of {stages} tables"
            )
        num_tables, num_centroids, length = table.shape
        check_tensor(tensors, "table", torch.int8 if "step" in tensors else torch.float16, table.shape)
        check_tensor(tensors, "step", torch.float16, (num_tables,))
        check_tensor(tensors, "scale", torch.float16, ())
        count = num_out * -(-num_in // length) * stages
        check_packed(tensors, "codes", count, index_width(num_centroids), num_centroids)

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], shape: list[int], stages: int) -> "VectorWeight":
        num_out, num_in = shape
        _, num_centroids, length = tensors["table"].shape
        sizes = num_out, -(-num_in // length), stages
        codes = unpack(tensors["codes"], index_width(num_centroids), sizes[0] * sizes[1] * sizes[2])
        return cls(codes.view(sizes), tensors["table"], num_in, tensors.get("step"), tensors.get("scale"))

    @staticmethod
    def multiply(
        inputs: Float[Tensor, "m in"], tensors: Mapping[str, Tensor], shape: list[int], stages: int
    ) -> Float[Tensor, "m out"]:
        """`inputs W^T` of the stored weight, float32 on the CPU, without decoding it (`mgvq.kernels.look_up`, `.gather`)."""
        tables, scale = centroids_by_one_thread(tensors["table"], tensors.get("step")), tensors.get("scale", torch.ones(()))
        width = index_width(tables.shape[1])
        if tables.shape[1] <= min(_LOOKED_UP, shape[0]):
            lut = contributions(inputs, tables, stages, 2**width)
            return look_up(tensors["codes"], lut, scale.expand(shape[0], 1), lut.shape[1])
        return multiply_rows(inputs, tensors["codes"], width, tables, stages, shape[0]) * scale.float()


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


def centroids_by_one_thread(table: Shaped[Tensor, "t k d"], step: Float[Tensor, "t"] | None) -> Float[Tensor, "t k d"]:
    """The same of tables on the CPU, to the bit, for kernels: torch's threads would spin for a while where theirs are to run."""
    values = table.numpy().astype(np.float32)
    return torch.from_numpy(values if step is None else values * step.float().numpy()[:, None, None])
