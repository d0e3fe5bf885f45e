"""Channel groups: each group's columns are a weight of their own, and every input channel says which group it belongs to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mgvq.formats.columns import ColumnWeight
from mgvq.formats.grid import GridWeight
from mgvq.formats.packing import pack, packed_bytes, unpack
from mgvq.formats.scalar import ScalarWeight
from mgvq.formats.vector import VectorWeight, index_width

SliceWeight = ScalarWeight | GridWeight | VectorWeight | ColumnWeight
SLICE_FORMATS = {f.format: f for f in get_args(SliceWeight)}  # what a group can be stored as


@dataclass(frozen=True)
class GroupedWeight:
    """Piece g holds the columns of group g in ascending order. `groups` is `pack_groups` of the group of every input channel.

    Layers that read the same activations hold the same `groups` object, which is then stored once.
    """

    slices: tuple[SliceWeight, ...]
    groups: UInt8[Tensor, "bytes"]
    num_in: int

    format: ClassVar[str] = "grouped"

    @property
    def shape(self) -> tuple[int, int]:
        return self.slices[0].shape[0], self.num_in

    def decode(self) -> Float[Tensor, "out in"]:
        """float32; exact for every device."""
        parts = [channel_slice.decode() for channel_slice in self.slices]
        group = unpack(self.groups, index_width(len(parts)), self.num_in).to(parts[0].device)
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
    def load(cls, tensors: Mapping[str, Tensor], shape: list[int], pieces: Sequence[Mapping[str, Any]]) -> "GroupedWeight":
        loaded = []
        for g, entry in enumerate(pieces):
            own = {role.removeprefix(f"{g}."): tensor for role, tensor in tensors.items() if role.startswith(f"{g}.")}
            settings = {key: value for key, value in entry.items() if key != "format"}
            loaded.append(SLICE_FORMATS[entry["format"]].load(own, **settings))
        return cls(tuple(loaded), tensors["groups"], shape[1])


def pack_groups(group: Int[Tensor, "in"]) -> UInt8[Tensor, "bytes"]:
    """The group of every input channel as it is stored; groups are numbered 0, 1, ... without a gap."""
    return pack(group, index_width(int(group.max()) + 1))


def group_bits(num_in: int, num_groups: int) -> int:
    """Exact size of `pack_groups` in bits."""
    return 8 * packed_bytes(num_in, index_width(num_groups))
