"""Encoding by fitted tables: every vector takes its nearest centroid, stage after stage or by a beam search."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mgvq.codebook.beam import beam_search
from mgvq.codebook.nearest import Nearest
from mgvq.formats.packing import narrowest
from mgvq.formats.vector import VectorWeight, centroids, index_width


@dataclass(frozen=True, kw_only=True)
class FittedTables:
    """The tables of one channel slice. Slices of one table group hold the same `table` and `step` objects."""

    table: Shaped[Tensor, "t k d"]
    """The tables as they are stored, fp16 or int8; those of one subspace follow each other, stage by stage."""
    step: Float[Tensor, "t"] | None
    """What int8 centroids are multiplied by, in fp16; None for fp16 tables."""
    stages: int
    """The number of tables whose centroids add up to a vector."""
    scale: Float[Tensor, ""] | None
    """What the vectors are divided by before they are encoded, in fp16; None: nothing."""
    channel_weight: Float[Tensor, "v d"] | None
    """How much each coordinate counts where no root is given; None: all alike."""
    num_in: int
    """Columns of the slice."""
    beam: int = 0
    """How many beginnings of a vector's codes a beam search keeps; 0: the codes are chosen stage after stage."""

    @property
    def vector_length(self) -> int:
        return self.table.shape[2]

    @cached_property
    def _tables(self) -> Sequence[tuple[Float[Tensor, "k d"], Nearest]]:
        return [(table, Nearest(table)) for table in centroids(self.table, self.step)]

    def encode(
        self, targets: Float[Tensor, "out v d"], first: int, root: Float[Tensor, "d d"] | None
    ) -> tuple[Int[Tensor, "out v stages"], Float[Tensor, "out v d"]]:
        """See `FittedCodebook`. Each stage takes the centroid nearest to what the stages before it leave over."""
        subspaces = len(self.table) // self.stages
        if subspaces == 1 or targets.shape[1] == 1:  # the thousands of short calls of LDLQ
            return self._encode_subspace(targets, first, root)
        codes = torch.empty(*targets.shape[:2], self.stages, dtype=torch.int32, device=targets.device)
        values = torch.empty_like(targets)
        for start in range(min(subspaces, targets.shape[1])):
            part = slice(start, None, subspaces)
            codes[:, part], values[:, part] = self._encode_subspace(targets[:, part], first + start, root)
        return codes, values

    def _encode_subspace(
        self, targets: Float[Tensor, "out v d"], first: int, root: Float[Tensor, "d d"] | None
    ) -> tuple[Int[Tensor, "out v stages"], Float[Tensor, "out v d"]]:
        """Encode the vectors `first`, `first + subspaces`, ... of every row, which use the same tables."""
        subspaces = len(self.table) // self.stages
        scaled = targets if self.scale is None else targets / self.scale.float()
        rest = scaled.reshape(-1, self.vector_length)
        own, weight = self._tables[first % subspaces * self.stages :][: self.stages], None
        if root is None and self.channel_weight is not None:
            weight = self.channel_weight[first::subspaces][: targets.shape[1]].repeat(len(targets), 1)
        if self.beam and weight is None:
            codes = list(beam_search(rest, torch.stack([table for table, _ in own]), root, self.beam).unbind(1))
            values = sum((table[code] for (table, _), code in zip(own, codes, strict=True)), torch.zeros(()))
        else:
            codes, values = _stage_by_stage(own, rest, weight, root)
        values = values.view_as(targets) if self.scale is None else values.view_as(targets) * self.scale.float()
        return torch.stack(codes, 1).int().view(*targets.shape[:2], -1), values

    def rows(self, part: slice) -> "FittedTables":
        del part  # all rows share the tables
        return self

    def weight(self, codes: Int[Tensor, "out v stages"]) -> VectorWeight:
        codes = narrowest(codes, index_width(self.table.shape[1]))
        return VectorWeight(codes, self.table, self.num_in, self.step, self.scale)


def _stage_by_stage(
    tables: Sequence[tuple[Float[Tensor, "k d"], Nearest]],
    rest: Float[Tensor, "n d"],
    weight: Float[Tensor, "n d"] | None,
    root: Float[Tensor, "d d"] | None,
) -> tuple[list[Int[Tensor, "n"]], Float[Tensor, "n d"]]:
    """Each stage's centroid nearest to what the stages before it leave, and the sum of these."""
    wide = None if root is None else root.double()
    metric = None if wide is None else wide.T @ wide
    codes, values = list[Tensor](), None
    for table, find in tables:
        codes.append(find(rest if values is None else rest - values, weight, metric))
        values = table[codes[-1]] if values is None else values + table[codes[-1]]
    assert values is not None, "there is a stage"
    return codes, values
