"""Symmetric uniform grids, `w = scale * (code - middle)`, where each group of channels takes one of a few scales."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, Integer, UInt8
from torch import Tensor

from mgvq.formats.base import Stored
from mgvq.formats.fit import check_packed, check_roles, check_tensor, check_whole, rows_and_columns
from mgvq.formats.packing import MAX_WIDTH, pack, packed_bytes, unpack
from mgvq.kernels.bits import entries
from mgvq.kernels.scalar import group_sums, multiply_codes

CHANNEL_BITS = 3  # bits of the power of sqrt(2) that an input channel is stretched by, from 1 to 11.3


@dataclass(frozen=True)
class GridWeight(Stored):
    """A weight on symmetric grids: `middle` is `(2^bits - 1) / 2`, no zero point is stored, and 0 is between two levels."""

    codes: Integer[Tensor, "out in"]
    """Integers of [0, 2^bits)."""
    scale_codes: Int[Tensor, "out groups"]
    """Integers of [0, 2^scale_bits): the scale of each group, among scales that rise geometrically."""
    span: Float[Tensor, "2"]
    """The smallest and the largest scale, in fp16."""
    bits: int
    """Bits of a code."""
    scale_bits: int
    """Bits of a scale code."""
    group_size: int
    """Input channels of a group; the last group of a row may be shorter."""
    channels: UInt8[Tensor, "bytes"] | None = None
    """`pack_channels` of a code for every input channel, which divides its column by `2^(code / 2)`. Layers that read the same
    activations hold the same object, which is then stored once."""

    format: ClassVar[str] = "grid"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def tunable(self) -> Mapping[str, Tensor]:
        return {"span": self.span}

    @property
    def is_linear(self) -> bool:
        return False

    def decoder(self) -> Callable[[Mapping[str, Tensor]], Float[Tensor, "out in"]]:
        num_in, chosen, centred = self.codes.shape[1], self.scale_codes.long(), self.codes.float() - middle(self.bits)
        stretched = None if self.channels is None else stretch(unpack(self.channels, CHANNEL_BITS, num_in))

        def weight(tensors: Mapping[str, Tensor]) -> Float[Tensor, "out in"]:
            scales = _differentiable_levels(tensors["span"], self.scale_bits)[chosen]
            weight = scales.repeat_interleave(self.group_size, 1)[:, :num_in] * centred
            return weight if stretched is None else weight / stretched

        return weight

    def tensors(self) -> Mapping[str, Tensor]:
        stored = {
            "codes": pack(self.codes.flatten(), self.bits),
            "scales": pack(self.scale_codes.flatten(), self.scale_bits),
            "span": self.span,
        }
        return stored if self.channels is None else {**stored, "channels": self.channels}

    def num_weights(self) -> Mapping[str, int]:
        return {"codes": math.prod(self.shape)}

    def settings(self) -> Mapping[str, Any]:
        sizes = {"bits": self.bits, "scale_bits": self.scale_bits, "group_size": self.group_size}
        return {"shape": list(self.shape), **sizes}

    @classmethod
    def check(cls, tensors: Mapping[str, Tensor], shape: list[int], bits: int, scale_bits: int, group_size: int) -> None:
        """Raises ValueError where the tensors are not those of a weight with these settings, or its scales no numbers > 0."""
        num_out, num_in = rows_and_columns(shape)
        check_whole(group_size=group_size)
        check_whole(most=MAX_WIDTH, bits=bits)
        check_whole(most=16, scale_bits=scale_bits)
        check_roles(tensors, ("codes", "scales", "span"), ("channels",))
        check_packed(tensors, "codes", num_out * num_in, bits)
        check_packed(tensors, "scales", num_out * -(-num_in // group_size), scale_bits)
        check_tensor(tensors, "span", torch.float16, (2,))
        check_packed(tensors, "channels", num_in, CHANNEL_BITS)
        if not tensors["span"].is_meta and not bool((tensors["span"] > 0).all()):
            raise ValueError(f"span is {tensors['span'].tolist()} instead of two numbers > 0")

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], shape: list[int], bits: int, scale_bits: int, group_size: int) -> "GridWeight":
        num_out, num_in = shape
        num_groups = -(-num_in // group_size)
        codes = unpack(tensors["codes"], bits, num_out * num_in).view(num_out, num_in)
        scale_codes = unpack(tensors["scales"], scale_bits, num_out * num_groups).view(num_out, num_groups)
        return cls(codes, scale_codes, tensors["span"], bits, scale_bits, group_size, tensors.get("channels"))

    @staticmethod
    def multiply(
        inputs: Float[Tensor, "m in"],
        tensors: Mapping[str, Tensor],
        shape: list[int],
        bits: int,
        scale_bits: int,
        group_size: int,
    ) -> Float[Tensor, "m out"]:
        """`inputs W^T` of the stored weight, float32 on the CPU, without decoding it (`mgvq.kernels.scalar`)."""
        num_out, num_in = shape
        groups = -(-num_in // group_size)
        levels = scale_levels(tensors["span"], scale_bits)
        scales = entries(tensors["scales"], scale_bits, num_out * groups, levels).view(num_out, groups)
        if "channels" in tensors:
            inputs = inputs / stretch(unpack(tensors["channels"], CHANNEL_BITS, num_in))
        products = multiply_codes(inputs, tensors["codes"], bits, scales, group_size)
        return products - middle(bits) * group_sums(inputs, group_size) @ scales.T

    @staticmethod
    def storage_bits(shape: tuple[int, int], bits: int, scale_bits: int, group_size: int) -> int:
        """The exact size of `tensors` in bits, without the channels."""
        num_out, num_in = shape
        num_groups = num_out * -(-num_in // group_size)
        return 8 * (packed_bytes(num_out * num_in, bits) + packed_bytes(num_groups, scale_bits)) + 2 * 16


def middle(bits: int) -> float:
    """The code that would stand for 0."""
    return (2**bits - 1) / 2


def scale_levels(span: Float[Tensor, "2"], scale_bits: int) -> Float[Tensor, "levels"]:
    """The scales of a layer in float32, rounded to fp16 so that devices, which differ in the last digit of a power, agree."""
    low, high = span.double().tolist()
    top = 2**scale_bits - 1
    levels = [low * (high / low) ** (i / top) for i in range(top + 1)]
    return torch.tensor(levels, dtype=torch.float16, device=span.device).float()


def _differentiable_levels(span: Float[Tensor, "2"], scale_bits: int) -> Float[Tensor, "levels"]:
    """`scale_levels`, with the gradient that they have before they are rounded to fp16."""
    exact = scale_levels(span.detach(), scale_bits)
    if not span.requires_grad:
        return exact
    low, high = span.double()
    smooth = low * (high / low) ** torch.linspace(0, 1, 2**scale_bits, dtype=torch.float64, device=span.device)
    return exact + (smooth - smooth.detach()).float()


def pack_channels(code: Int[Tensor, "in"]) -> UInt8[Tensor, "bytes"]:
    """Pack the codes of all input channels as they are stored."""
    return pack(code, CHANNEL_BITS)


def channel_bits(num_in: int) -> int:
    """The exact size of `pack_channels` in bits."""
    return 8 * packed_bytes(num_in, CHANNEL_BITS)


def stretch(code: Int[Tensor, "in"]) -> Float[Tensor, "in"]:
    """What a channel's weights are multiplied by before they are rounded: `2^(code / 2)`, float32."""
    factors = torch.tensor([2 ** (i / 2) for i in range(2**CHANNEL_BITS)], device=code.device)
    return factors[code.long()]
