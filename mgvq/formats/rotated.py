"""Weights that are stored in a rotated basis: `W = U^T W' V`, with the signs of both rotations."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mgvq.formats.base import Stored
from mgvq.formats.fit import check_inner, check_packed, rows_and_columns
from mgvq.formats.grouped import SLICE_FORMATS, GroupedWeight, SliceWeight, group_numbers
from mgvq.formats.packing import pack, unpack
from mgvq.kernels.linear import multiply_by
from mgvq.kernels.rotation import turn
from mgvq.rotation import Rotation, rotate_matrix_back

_SIGNS = ("signs_in", "signs_out")
INNER_FORMATS = {**SLICE_FORMATS, GroupedWeight.format: GroupedWeight}


@dataclass(frozen=True)
class RotatedWeight(Stored):
    """A stored weight W' of the turned layer, and the random signs of the rotations that turned it.

    Layers that read the same activations hold the same `signs_in` object, which is then stored once.
    """

    inner: SliceWeight | GroupedWeight
    signs_in: UInt8[Tensor, "in_bytes"] | None  # packed, one bit an input channel; None: inputs are not turned
    signs_out: UInt8[Tensor, "out_bytes"] | None
    within: str  # layer: one rotation of all input channels | group: one within each channel group

    format: ClassVar[str] = "rotated"

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def inputs(self) -> Rotation | None:
        """V, which turns the layer's input."""
        if self.signs_in is None:
            return None
        groups = self.inner.channel_groups() if self.within == "group" and isinstance(self.inner, GroupedWeight) else None
        return rotation_of(self.signs_in, self.shape[1], groups)

    @property
    def outputs(self) -> Rotation | None:
        """U, whose transpose turns the layer's output back."""
        return None if self.signs_out is None else rotation_of(self.signs_out, self.shape[0], None)

    @property
    def tunable(self) -> Mapping[str, Tensor]:
        return self.inner.tunable

    @property
    def is_linear(self) -> bool:
        return self.inner.is_linear

    def decoder(self) -> Callable[[Mapping[str, Tensor]], Float[Tensor, "out in"]]:
        inner, outputs, inputs = self.inner.decoder(), self.outputs, self.inputs
        return lambda tensors: rotate_matrix_back(inner(tensors), outputs, inputs)

    def tensors(self) -> Mapping[str, Tensor]:
        signs = {"signs_in": self.signs_in, "signs_out": self.signs_out}
        return {**self.inner.tensors(), **{role: tensor for role, tensor in signs.items() if tensor is not None}}

    def num_weights(self) -> Mapping[str, int]:
        return self.inner.num_weights()

    def settings(self) -> Mapping[str, Any]:
        inner = {"format": self.inner.format, **self.inner.settings()}
        return {"shape": list(self.shape), "within": self.within, "inner": inner}

    @classmethod
    def check(cls, tensors: Mapping[str, Tensor], shape: list[int], within: str, inner: Mapping[str, Any]) -> None:
        """Raises ValueError where the tensors are not those of a weight with these settings."""
        num_out, num_in = rows_and_columns(shape)
        if within not in ("layer", "group"):
            raise ValueError(f"within is {within!r} instead of layer or group")
        check_packed(tensors, "signs_in", num_in, 1)
        check_packed(tensors, "signs_out", num_out, 1)
        own = {role: tensor for role, tensor in tensors.items() if role not in _SIGNS}
        check_inner(INNER_FORMATS, own, inner, (num_out, num_in))

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], shape: list[int], within: str, inner: Mapping[str, Any]) -> "RotatedWeight":
        own = {role: tensor for role, tensor in tensors.items() if not role.startswith("signs_")}
        settings = {key: value for key, value in inner.items() if key != "format"}
        loaded = INNER_FORMATS[inner["format"]].load(own, **settings)
        return cls(loaded, tensors.get("signs_in"), tensors.get("signs_out"), within)

    @staticmethod
    def multiply(
        inputs: Float[Tensor, "m in"], tensors: Mapping[str, Tensor], shape: list[int], within: str, inner: Mapping[str, Any]
    ) -> Float[Tensor, "m out"]:
        """`inputs W^T` of the stored weight, float32 on the CPU, without decoding it: `U^T W' V x` for each input x."""
        if "signs_in" in tensors:
            grouped = within == "group" and inner["format"] == GroupedWeight.format
            groups = group_numbers(tensors["groups"], len(inner["pieces"]), shape[1]) if grouped else None
            inputs = turn(inputs, signs_of(tensors["signs_in"], shape[1]), groups)
        outputs = multiply_by(INNER_FORMATS[inner["format"]], inputs, tensors, inner)
        if "signs_out" in tensors:
            outputs = turn(outputs, signs_of(tensors["signs_out"], shape[0]), back=True)
        return outputs


def pack_signs(rotation: Rotation) -> UInt8[Tensor, "bytes"]:
    """One bit a channel, 1 for a negative sign."""
    signs = torch.empty(sum(map(len, rotation.blocks)))
    for block, own in zip(rotation.blocks, rotation.signs, strict=True):
        signs[block] = own
    return pack((signs < 0).int(), 1)


def signs_of(packed: UInt8[Tensor, "bytes"], n: int) -> Float[Tensor, "n"]:
    """The n signs that were packed, +1 and -1, float32."""
    return 1.0 - 2.0 * unpack(packed, 1, n).float()


def rotation_of(packed: UInt8[Tensor, "bytes"], n: int, groups: Tensor | None) -> Rotation:
    """The rotation of n channels whose signs were packed; within each of the `groups` of channels, or of all together."""
    signs = signs_of(packed, n)
    numbers = torch.zeros(n, dtype=torch.int64) if groups is None else groups
    blocks = [torch.nonzero(numbers == g).flatten() for g in numbers.unique().tolist()]
    return Rotation(blocks, [signs[block] for block in blocks])
