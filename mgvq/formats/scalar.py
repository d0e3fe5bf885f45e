"""Uniform grids, `w = scale * (code - zero)`, with an fp16 scale and a packed zero point for each group of input channels."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, Integer, Shaped
from torch import Tensor

from mgvq.formats.base import Stored
from mgvq.formats.fit import check_packed, check_roles, check_tensor, check_whole, rows_and_columns
from mgvq.formats.packing import MAX_WIDTH, pack, packed_bytes, unpack
from mgvq.kernels.bits import entries
from mgvq.kernels.scalar import group_sums, multiply_codes


@dataclass(frozen=True)
class ScalarWeight(Stored):
    """A weight on asymmetric grids."""

    codes: Integer[Tensor, "out in"]
    """Integers of [0, 2^bits)."""
    zeros: Int[Tensor, "out groups"]
    """The codes that stand for 0, integers of [0, 2^bits)."""
    scales: Float[Tensor, "out groups"]
    """The distances of two levels, in fp16."""
    bits: int
    """Bits of a code and of a zero point."""
    group_size: int
    """Input channels of a group; the last group of a row may be shorter."""

    format: ClassVar[str] = "scalar"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def tunable(self) -> Mapping[str, Tensor]:
        return {"scales": self.scales}

    @property
    def is_linear(self) -> bool:
        return True

    def decoder(self) -> Callable[[Mapping[str, Tensor]], Float[Tensor, "out in"]]:
        levels = self.codes.float() - self._by_channel(self.zeros)
        return lambda tensors: self._by_channel(tensors["scales"]) * levels

    def _by_channel(self, values: Shaped[Tensor, "out groups"]) -> Float[Tensor, "out in"]:
        return values.repeat_interleave(self.group_size, 1)[:, : self.codes.shape[1]].float()

    def tensors(self) -> Mapping[str, Tensor]:
        return {
            "codes": pack(self.codes.flatten(), self.bits),
            "zeros": pack(self.zeros.flatten(), self.bits),
            "scales": self.scales,
        }

    def num_weights(self) -> Mapping[str, int]:
        return {"codes": math.prod(self.shape)}

    def settings(self) -> Mapping[str, Any]:
        return {"shape": list(self.shape), "bits": self.bits, "group_size": self.group_size}

    @classmethod
    def check(cls, tensors: Mapping[str, Tensor], shape: list[int], bits: int, group_size: int) -> None:
        """Raises ValueError where the tensors are not those of a weight with these settings."""
        num_out, num_in = rows_and_columns(shape)
        check_whole(group_size=group_size)
        check_whole(most=MAX_WIDTH, bits=bits)
        num_groups = -(-num_in // group_size)
        check_roles(tensors, ("codes", "zeros", "scales"))
        check_packed(tensors, "codes", num_out * num_in, bits)
        check_packed(tensors, "zeros", num_out * num_groups, bits)
        check_tensor(tensors, "scales", torch.float16, (num_out, num_groups))

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], shape: list[int], bits: int, group_size: int) -> "ScalarWeight":
        num_out, num_in = shape
        codes = unpack(tensors["codes"], bits, num_out * num_in).view(num_out, num_in)
        scales = tensors["scales"]
        zeros = unpack(tensors["zeros"], bits, scales.numel()).view_as(scales)
        return cls(codes, zeros, scales, bits, group_size)

    @staticmethod
    def multiply(
        inputs: Float[Tensor, "m in"], tensors: Mapping[str, Tensor], shape: list[int], bits: int, group_size: int
    ) -> Float[Tensor, "m out"]:
        """`inputs W^T` of the stored weight, float32 on the CPU, without decoding it (`mgvq.kernels.scalar`)."""
        scales = tensors["scales"].float()
        zeros = entries(tensors["zeros"], bits, scales.numel(), torch.arange(2.0**bits)).view_as(scales)
        products = multiply_codes(inputs, tensors["codes"], bits, scales, group_size)
        return products - group_sums(inputs, group_size) @ (scales * zeros).T

    @staticmethod
    def storage_bits(shape: tuple[int, int], bits: int, group_size: int) -> int:
        """The exact size of `tensors` in bits."""
        num_out, num_in = shape
        num_groups = num_out * -(-num_in // group_size)
        return 8 * (packed_bytes(num_out * num_in, bits) + packed_bytes(num_groups, bits) + 2 * num_groups)
