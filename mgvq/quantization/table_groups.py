"""Table groups: channel slices of layers that share a codebook table, hence a rate."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.protocols import Codebook
from mgvq.types import ChannelSlice, Site, TableGroupInfo


@dataclass(frozen=True)
class TableGroup:
    """The pieces in the order of the layers, and what an allocation may know of them."""

    info: TableGroupInfo
    slices: tuple[ChannelSlice, ...]


def cut_table_groups(
    groups: Mapping[Site, Int[Tensor, "_"]], scores: Mapping[Site, Float[Tensor, "_"]], codebook: Codebook
) -> list[TableGroup]:
    """All pieces of all layers, gathered by the codebook's rule; units in the order of their first piece."""
    gathered: dict[str, list[ChannelSlice]] = defaultdict(list)
    for site, group in groups.items():
        for number in range(int(group.max()) + 1):
            channel_slice = ChannelSlice(site, number, torch.nonzero(group == number).flatten())
            gathered[codebook.table_group(channel_slice)].append(channel_slice)
    totals = {name: sum(float(scores[p.site][p.columns].double().sum()) for p in slices) for name, slices in gathered.items()}
    quantiles = _quantiles(gathered, totals)
    depths = _depths(list(groups))
    return [
        TableGroup(
            TableGroupInfo(
                name=name,
                tower=slices[0].site.tower,
                kind=slices[0].site.kind,
                block=slices[0].site.block,
                depth=depths[slices[0].site],
                group=slices[0].group,
                num_weights=sum(p.num_weights for p in slices),
                score=totals[name],
                quantile=quantiles[name],
            ),
            tuple(slices),
        )
        for name, slices in gathered.items()
    ]


def _quantiles(gathered: Mapping[str, Sequence[ChannelSlice]], totals: Mapping[str, float]) -> dict[str, float]:
    """Rank of a unit's mean channel score among those of its tower, 0 .. 1; a unit alone: .5."""
    towers: dict[str, list[str]] = defaultdict(list)
    for name, slices in gathered.items():
        towers[slices[0].site.tower].append(name)
    ranks: dict[str, float] = {}
    for names in towers.values():
        names.sort(key=lambda name: totals[name] / sum(len(p.columns) for p in gathered[name]))
        ranks |= {name: rank / (len(names) - 1) if len(names) > 1 else 0.5 for rank, name in enumerate(names)}
    return ranks


def _depths(sites: Sequence[Site]) -> dict[Site, float]:
    last: dict[str, int] = defaultdict(int)
    for site in sites:
        last[site.tower] = max(last[site.tower], site.block or 0)
    return {s: 0.5 if s.block is None or not last[s.tower] else s.block / last[s.tower] for s in sites}
