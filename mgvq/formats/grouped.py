"""Channel groups: the columns of each group are a weight of their own, and every input channel says which group it belongs to."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mgvq.formats.exponent import PLAIN_FORMATS, ExponentWeight, PlainWeight
from mgvq.formats.fit import check_inner, check_packed, check_roles, rows_and_columns
from mgvq.formats.packing import pack, unpack
from mgvq.formats.vector import index_width
from mgvq.kernels.linear import multiply_by

SliceWeight = PlainWeight | ExponentWeight
SLICE_FORMATS = {**PLAIN_FORMATS, ExponentWeight.format: ExponentWeight}  # what a group can be stored as


@dataclass(frozen=True)
class GroupedWeight:
    """A layer whose channel groups are stored one by one."""

    slices: tuple[SliceWeight, ...]
    """Slice g holds the columns of group g, in ascending order."""
    groups: UInt8[Tensor, "bytes"]
    """`pack_groups` of the group of every input channel. Layers that read the same activations hold the same object, which is
    then stored once."""
    num_in: int
    """Input channels of the layer."""

    format: ClassVar[str] = "grouped"

    @property
    def shape(self) -> tuple[int, int]:
        return self.slices[0].shape[0], self.num_in

    def channel_groups(self) -> Int[Tensor, "in"]:
        """The group of every input channel."""
        return group_numbers(self.groups, len(self.slices), self.num_in)

    def decode(self) -> Float[Tensor, "out in"]:
        """Return the weight in float32, exactly the same on every device."""
        parts = [channel_slice.decode() for channel_slice in self.slices]
        group = self.channel_groups().to(parts[0].device)
        weight = parts[0].new_empty(self.shape)
        for g, part in enumerate(parts):
            weight[:, group == g] = part
        return weight

    def tensors(self) -> Mapping[str, Tensor]:
        parts = {
            f"{g}.{role}": tensor
            for g, channel_slice in enumerate(self.slices)
            for role, tensor in channel_slice.tensors().items()
        }
        return {**parts, "groups": self.groups}

    def num_weights(self) -> Mapping[str, int]:
        return {
            f"{g}.{role}": number
            for g, channel_slice in enumerate(self.slices)
            for role, number in channel_slice.num_weights().items()
        }

    def settings(self) -> Mapping[str, Any]:
        return {"shape": list(self.shape), "pieces": [{"format": p.format, **p.settings()} for p in self.slices]}

    @classmethod
    def check(cls, tensors: Mapping[str, Tensor], shape: list[int], pieces: Sequence[Mapping[str, Any]]) -> None:
        """Raises ValueError where the tensors are not those of a weight with these settings, or groups have other sizes."""
        num_out, num_in = rows_and_columns(shape)
        sizes = [rows_and_columns(piece["shape"])[1] for piece in pieces]
        if not sizes or sum(sizes) != num_in:
            raise ValueError(f"its pieces have {sizes} columns instead of {num_in} in all")
        own = {g: f"{g}." for g in range(len(sizes))}
        check_roles(tensors, ("groups",), [role for role in tensors if role.startswith(tuple(own.values()))])
        check_packed(tensors, "groups", num_in, index_width(len(sizes)), len(sizes))
        for g, (piece, size) in enumerate(zip(pieces, sizes, strict=True)):
            part = {role.removeprefix(own[g]): tensor for role, tensor in tensors.items() if role.startswith(own[g])}
            check_inner(SLICE_FORMATS, part, piece, (num_out, size))
        if not tensors["groups"].is_meta:
            found = unpack(tensors["groups"], index_width(len(sizes)), num_in).bincount(minlength=len(sizes)).tolist()
            if found != sizes:
                raise ValueError(f"groups has {found} channels a group where the pieces have {sizes} columns")

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], shape: list[int], pieces: Sequence[Mapping[str, Any]]) -> "GroupedWeight":
        loaded = tuple(kind.load(own, **settings) for kind, own, settings in _parts(tensors, pieces))
        return cls(loaded, tensors["groups"], shape[1])

    @staticmethod
    def multiply(
        inputs: Float[Tensor, "m in"], tensors: Mapping[str, Tensor], shape: list[int], pieces: Sequence[Mapping[str, Any]]
    ) -> Float[Tensor, "m out"]:
        """`inputs W^T` of the stored weight, float32 on the CPU, without decoding it: the sum over the groups."""
        group = group_numbers(tensors["groups"], len(pieces), shape[1])
        total = inputs.new_zeros(len(inputs), shape[0])
        for g, (kind, own, settings) in enumerate(_parts(tensors, pieces)):
            total += multiply_by(kind, inputs[:, group == g], own, settings)
        return total


def pack_groups(group: Int[Tensor, "in"]) -> UInt8[Tensor, "bytes"]:
    """Pack the group of every input channel as it is stored; groups are numbered 0, 1, ... without a gap."""
    return pack(group, index_width(int(group.max()) + 1))


def group_numbers(packed: UInt8[Tensor, "bytes"], num_groups: int, num_in: int) -> Int[Tensor, "in"]:
    """The group of every input channel, as `pack_groups` was given it."""
    return unpack(packed, index_width(num_groups), num_in)


def _parts(tensors: Mapping[str, Tensor], pieces: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Any, Mapping, Mapping]]:
    """Each slice's format, its stored tensors and its settings."""
    for g, entry in enumerate(pieces):
        own = {role.removeprefix(f"{g}."): tensor for role, tensor in tensors.items() if role.startswith(f"{g}.")}
        yield SLICE_FORMATS[entry["format"]], own, {key: value for key, value in entry.items() if key != "format"}
