"""Table groups: channel slices of layers that share a codebook table, hence a rate."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.protocols import Codebook
from mgvq.types import ChannelSlice, LayerProblem, Site, TableGroupInfo


@dataclass(frozen=True)
class TableGroup:
    """Channel slices that share a codebook table, hence a rate."""

    info: TableGroupInfo  # what an allocation may know of them
    slices: tuple[ChannelSlice, ...]  # in the order of the layers


def cut_table_groups(problems: Mapping[Site, LayerProblem], codebook: Codebook) -> list[TableGroup]:
    """All channel slices of all layers, gathered by the codebook's rule; in the order of their first slices."""
    gathered: dict[str, list[ChannelSlice]] = defaultdict(list)
    for site, problem in problems.items():
        for number in range(int(problem.groups.max()) + 1):
            channel_slice = ChannelSlice(site, number, torch.nonzero(problem.groups == number).flatten())
            gathered[codebook.table_group(channel_slice)].append(channel_slice)
    totals = {
        name: sum(float(problems[s.site].score[s.columns].double().sum()) for s in slices) for name, slices in gathered.items()
    }
    quantiles = _quantiles(gathered, totals)
    depths = _depths(list(problems))
    energies = {site: _log_energies(problem.score) for site, problem in problems.items()}
    return [
        TableGroup(
            TableGroupInfo(
                name=name,
                tower=slices[0].site.tower,
                kind=slices[0].site.kind,
                block=slices[0].site.block,
                depth=depths[slices[0].site],
                group=slices[0].group,
                num_weights=sum(s.num_weights for s in slices),
                score=totals[name],
                quantile=quantiles[name],
                log_energy=float(torch.cat([energies[s.site][s.columns] for s in slices]).mean()),
            ),
            tuple(slices),
        )
        for name, slices in gathered.items()
    ]


def _log_energies(score: Float[Tensor, "in"]) -> Float[Tensor, "in"]:
    """log2(I + 1) of every channel, I its score over their geometric mean; none counts less than 2^-40 of the largest."""
    if not score.any():
        return torch.ones(len(score), dtype=torch.float64)
    logs = score.double().clamp(min=2.0**-40 * float(score.max())).log2()
    return ((logs - logs.mean()).exp2() + 1).log2()


def _quantiles(gathered: Mapping[str, Sequence[ChannelSlice]], totals: Mapping[str, float]) -> dict[str, float]:
    """The rank of a table group's mean channel score in its tower, 0 .. 1; .5 for one that is alone there."""
    towers: dict[str, list[str]] = defaultdict(list)
    for name, slices in gathered.items():
        towers[slices[0].site.tower].append(name)
    ranks: dict[str, float] = {}
    for names in towers.values():
        names.sort(key=lambda name: totals[name] / sum(len(s.columns) for s in gathered[name]))
        ranks |= {name: rank / (len(names) - 1) if len(names) > 1 else 0.5 for rank, name in enumerate(names)}
    return ranks


def _depths(sites: Sequence[Site]) -> dict[Site, float]:
    last: dict[str, int] = defaultdict(int)
    for site in sites:
        last[site.tower] = max(last[site.tower], site.block or 0)
    return {s: 0.5 if s.block is None or not last[s.tower] else s.block / last[s.tower] for s in sites}
