"""Channel groups: the columns of each group are a weight of their own, and every input channel says which group it belongs to."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mgvq.formats.base import Stored
from mgvq.formats.exponent import PLAIN_FORMATS, ExponentWeight, PlainWeight
from mgvq.formats.fit import check_inner, check_packed, check_roles, rows_and_columns
from mgvq.formats.packing import pack, unpack
from mgvq.formats.vector import index_width
from mgvq.kernels.linear import multiply_by

SliceWeight = PlainWeight | ExponentWeight
SLICE_FORMATS = {**PLAIN_FORMATS, ExponentWeight.format: ExponentWeight}  # what a group can be stored as


@dataclass(frozen=True)
class GroupedWeight(Stored):
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

    @property
    def tunable(self) -> Mapping[str, Tensor]:
        return _numbered([channel_slice.tunable for channel_slice in self.slices])

    @property
    def is_linear(self) -> bool:
        return all(channel_slice.is_linear for channel_slice in self.slices)

    def decoder(self) -> Callable[[Mapping[str, Tensor]], Float[Tensor, "out in"]]:
        parts = [channel_slice.decoder() for channel_slice in self.slices]
        place = torch.argsort(self.channel_groups(), stable=True).argsort()  # of every input channel, group by group

        def weight(tensors: Mapping[str, Tensor]) -> Float[Tensor, "out in"]:
            sorted_by_group = torch.cat([part(_own(tensors, g)) for g, part in enumerate(parts)], 1)
            return sorted_by_group.index_select(1, place.to(sorted_by_group.device))

        return weight

    def tensors(self) -> Mapping[str, Tensor]:
        return {**_numbered([channel_slice.tensors() for channel_slice in self.slices]), "groups": self.groups}

    def num_weights(self) -> Mapping[str, int]:
        return _numbered([channel_slice.num_weights() for channel_slice in self.slices])

    def settings(self) -> Mapping[str, Any]:
        return {"shape": list(self.shape), "pieces": [{"format": p.format, **p.settings()} for p in self.slices]}

    @classmethod
    def check(cls, tensors: Mapping[str, Tensor], shape: list[int], pieces: Sequence[Mapping[str, Any]]) -> None:
        """Raises ValueError where the tensors are not those of a weight with these settings, or groups have other sizes."""
        num_out, num_in = rows_and_columns(shape)
        sizes = [rows_and_columns(piece["shape"])[1] for piece in pieces]
        if not sizes or sum(sizes) != num_in:
            raise ValueError(f"its pieces have {sizes} columns instead of {num_in} in all")
        parts = [_own(tensors, g) for g in range(len(sizes))]
        check_roles(tensors, ("groups",), _numbered(parts))
        check_packed(tensors, "groups", num_in, index_width(len(sizes)), len(sizes))
        for part, piece, size in zip(parts, pieces, sizes, strict=True):
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


def _numbered(slices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What each slice has by role, by the roles that a layer stores them under."""
    return {f"{g}.{role}": value for g, own in enumerate(slices) for role, value in own.items()}


def _own(tensors: Mapping[str, Tensor], group: int) -> dict[str, Tensor]:
    """What belongs to one slice, by its own roles."""
    return {role.removeprefix(f"{group}."): tensor for role, tensor in tensors.items() if role.startswith(f"{group}.")}


def pack_groups(group: Int[Tensor, "in"]) -> UInt8[Tensor, "bytes"]:
    """Pack the group of every input channel as it is stored; groups are numbered 0, 1, ... without a gap."""
    return pack(group, index_width(int(group.max()) + 1))


def group_numbers(packed: UInt8[Tensor, "bytes"], num_groups: int, num_in: int) -> Int[Tensor, "in"]:
    """The group of every input channel, as `pack_groups` was given it."""
    return unpack(packed, index_width(num_groups), num_in)


def _parts(tensors: Mapping[str, Tensor], pieces: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Any, Mapping, Mapping]]:
    """Each slice's format, its stored tensors and its settings."""
    for g, entry in enumerate(pieces):
        yield SLICE_FORMATS[entry["format"]], _own(tensors, g), {key: value for key, value in entry.items() if key != "format"}
