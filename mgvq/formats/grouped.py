"""Channel groups: the columns of each group are a weight of their own, and every input channel says which group it belongs to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mgvq.formats.exponent import PLAIN_FORMATS, ExponentWeight, PlainWeight
from mgvq.formats.packing import pack, unpack
from mgvq.formats.vector import index_width

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
        return unpack(self.groups, index_width(len(self.slices)), self.num_in)

    def decode(self) -> Float[Tensor, "out in"]:
        """Return the weight in float32, exactly the same on every device."""
        return self.decoder()(self.tunable)

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
    def load(cls, tensors: Mapping[str, Tensor], shape: list[int], pieces: Sequence[Mapping[str, Any]]) -> "GroupedWeight":
        loaded = []
        for g, entry in enumerate(pieces):
            settings = {key: value for key, value in entry.items() if key != "format"}
            loaded.append(SLICE_FORMATS[entry["format"]].load(_own(tensors, g), **settings))
        return cls(tuple(loaded), tensors["groups"], shape[1])


def _numbered(slices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What each slice has by role, by the roles that a layer stores them under."""
    return {f"{g}.{role}": value for g, own in enumerate(slices) for role, value in own.items()}


def _own(tensors: Mapping[str, Tensor], group: int) -> dict[str, Tensor]:
    """What belongs to one slice, by its own roles."""
    return {role.removeprefix(f"{group}."): tensor for role, tensor in tensors.items() if role.startswith(f"{group}.")}


def pack_groups(group: Int[Tensor, "in"]) -> UInt8[Tensor, "bytes"]:
    """Pack the group of every input channel as it is stored; groups are numbered 0, 1, ... without a gap."""
    return pack(group, index_width(int(group.max()) + 1))
