"""Uniform grids: `w = scale * (code - zero)` with an fp16 scale and a packed zero point for each group of input channels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.formats.packing import pack, packed_bytes, unpack

_HALF_MAX = 65000.0


@dataclass(frozen=True)
class ScalarWeight:
    """Codes and zero points are integers of [0, 2^bits); the last group of a row may be shorter than `group_size`."""

    codes: Int[Tensor, "out in"]
    zeros: Int[Tensor, "out groups"]
    scales: Float[Tensor, "out groups"]  # fp16
    bits: int
    group_size: int

    format: ClassVar[str] = "scalar"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def decode(self) -> Float[Tensor, "out in"]:
        """float32; exact for every device."""
        num_in = self.codes.shape[1]
        scales, zeros = (t.repeat_interleave(self.group_size, 1)[:, :num_in].float() for t in (self.scales, self.zeros))
        return scales * (self.codes.float() - zeros)

    def tensors(self) -> Mapping[str, Tensor]:
        return {
            "codes": pack(self.codes.flatten(), self.bits),
            "zeros": pack(self.zeros.flatten(), self.bits),
            "scales": self.scales,
        }

    def settings(self) -> Mapping[str, Any]:
        return {"shape": list(self.shape), "bits": self.bits, "group_size": self.group_size}

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], shape: list[int], bits: int, group_size: int) -> "ScalarWeight":
        num_out, num_in = shape
        codes = unpack(tensors["codes"], bits, num_out * num_in).view(num_out, num_in)
        scales = tensors["scales"]
        zeros = unpack(tensors["zeros"], bits, scales.numel()).view_as(scales)
        return cls(codes, zeros, scales, bits, group_size)

    @staticmethod
    def storage_bits(shape: tuple[int, int], bits: int, group_size: int) -> int:
        """Exact size of `tensors` in bits."""
        num_out, num_in = shape
        num_groups = num_out * -(-num_in // group_size)
        return 8 * (packed_bytes(num_out * num_in, bits) + packed_bytes(num_groups, bits) + 2 * num_groups)


def min_max(weight: Float[Tensor, "out in"], bits: int, group_size: int) -> ScalarWeight:
    """Round to nearest on the grid between minimum and maximum of each group; 0 is always on the grid."""
    num_out, num_in = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -num_in % group_size)).view(num_out, -1, group_size)
    top = 2**bits - 1
    low, high = padded.amin(2).clamp(max=0), padded.amax(2).clamp(min=0)
    if not (high - low).max() < _HALF_MAX * top:
        raise ValueError(f"weights must be finite and span less than {_HALF_MAX * top:g}, got [{low.min()}, {high.max()}]")
    # The scale is rounded to fp16 before the codes are chosen, so that they fit what is stored; upwards, so that the grid reaches
    # the largest weight.
    scales = _half_up(((high - low) / top).clamp(min=2.0**-24))
    zeros = (-low / scales.float()).round().clamp(0, top)
    codes = (padded / scales.float()[..., None] + zeros[..., None]).round().clamp(0, top)
    return ScalarWeight(codes.view(num_out, -1)[:, :num_in].int(), zeros.int(), scales, bits, group_size)


def _half_up(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The smallest fp16 numbers that are not below the values."""
    half = values.half()
    return torch.where(half.float() < values, torch.nextafter(half, torch.full_like(half, torch.inf)), half)
