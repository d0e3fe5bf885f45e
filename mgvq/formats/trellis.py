"""Trellis codes: tiles of 16 x 16 weights, each a tail-biting walk through the states of a shift register; no table is stored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mgvq.formats.base import Stored
from mgvq.formats.fit import check_roles, check_tensor, check_whole, rows_and_columns
from mgvq.kernels.trellis import multiply_walks
from mgvq.trellis.code import TrellisCode, Values
from mgvq.trellis.coding import decode

TILE = 16  # rows and columns; a sequence is the rows of a tile one after the other


@dataclass(frozen=True)
class TrellisWeight(Stored):
    """The bits of every tile, and one scale; rows and columns that fill up the last tiles are stored and counted."""

    codes: UInt8[Tensor, "tiles v bytes"]  # tiles of rows, vectors of 16 columns
    code: TrellisCode
    scale: Float[Tensor, ""]  # fp16, multiplies the values of the states
    num_out: int
    num_in: int

    format: ClassVar[str] = "trellis"

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_out, self.num_in

    @property
    def tunable(self) -> Mapping[str, Tensor]:
        return {"scale": self.scale}

    @property
    def is_linear(self) -> bool:
        return True

    def decoder(self) -> Callable[[Mapping[str, Tensor]], Float[Tensor, "out in"]]:
        values = decode(self.codes.flatten(0, 1), self.code, TILE * TILE)
        values = from_tiles(values.unflatten(0, self.codes.shape[:2]))[: self.num_out, : self.num_in]
        return lambda tensors: values * tensors["scale"].float()

    def tensors(self) -> Mapping[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale}

    def num_weights(self) -> Mapping[str, int]:
        return {"codes": self.num_out * self.num_in}

    def settings(self) -> Mapping[str, Any]:
        code = self.code
        sizes = {"state_bits": code.state_bits, "step_bits": code.step_bits, "step_weights": code.step_weights}
        return {"shape": list(self.shape), "values": code.values, **sizes}

    @classmethod
    def check(cls, tensors: Mapping[str, Tensor], shape: list[int], **code: Any) -> None:
        """Raises ValueError where the tensors are not those of a weight with these settings."""
        num_out, num_in = rows_and_columns(shape)
        check_whole(**{name: value for name, value in code.items() if name != "values"})
        num_bytes = TrellisCode(**code).num_bytes(TILE * TILE)
        check_roles(tensors, ("codes", "scale"))
        check_tensor(tensors, "codes", torch.uint8, (-(-num_out // TILE), -(-num_in // TILE), num_bytes))
        check_tensor(tensors, "scale", torch.float16, ())

    @classmethod
    def load(
        cls,
        tensors: Mapping[str, Tensor],
        shape: list[int],
        values: Values,
        state_bits: int,
        step_bits: int,
        step_weights: int,
    ) -> "TrellisWeight":
        code = TrellisCode(state_bits=state_bits, step_bits=step_bits, step_weights=step_weights, values=values)
        return cls(tensors["codes"], code, tensors["scale"], *shape)

    @staticmethod
    def multiply(
        inputs: Float[Tensor, "m in"],
        tensors: Mapping[str, Tensor],
        shape: list[int],
        values: Values,
        state_bits: int,
        step_bits: int,
        step_weights: int,
    ) -> Float[Tensor, "m out"]:
        """`inputs W^T` of the stored weight, float32 on the CPU, without decoding it (`mgvq.kernels.trellis`)."""
        code = TrellisCode(state_bits=state_bits, step_bits=step_bits, step_weights=step_weights, values=values)
        return multiply_walks(inputs, tensors["codes"], code, shape[0]) * tensors["scale"].float()

    @staticmethod
    def storage_bits(shape: tuple[int, int], code: TrellisCode) -> int:
        """Exact size in bits."""
        num_tiles = -(-shape[0] // TILE) * -(-shape[1] // TILE)
        return 8 * num_tiles * code.num_bytes(TILE * TILE) + 16


def to_tiles(vectors: Float[Tensor, "out v 16"]) -> Float[Tensor, "tiles v 256"]:
    """Runs of 16 rows of the vectors, the last one filled up with zeros."""
    padded = torch.nn.functional.pad(vectors, (0, 0, 0, 0, 0, -len(vectors) % TILE))
    return padded.unflatten(0, (-1, TILE)).transpose(1, 2).flatten(2)


def from_tiles(tiles: Float[Tensor, "tiles v 256"]) -> Float[Tensor, "rows columns"]:
    """The inverse, as a matrix with its padding."""
    return tiles.unflatten(2, (TILE, TILE)).transpose(1, 2).flatten(0, 1).flatten(1)
