"""What layers store beside the codebooks of their table groups, and what each layer stores in all."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from jaxtyping import UInt8
from torch import Tensor

from mgvq.formats.grouped import pack_groups
from mgvq.quantization.table_groups import TableGroup
from mgvq.types import LayerProblem, RateTable, Site

Held = Mapping[Site, Sequence[Tensor]]  # the stored tensors of a layer: group ids, signs, outliers; one object where layers share


def group_ids(problems: Mapping[Site, LayerProblem]) -> dict[str, UInt8[Tensor, "_"]]:
    """The packed group of every input channel by `Site.reads`, where layers have several groups."""
    return {site.reads: pack_groups(p.groups) for site, p in problems.items() if p.groups.max() > 0}


def held_by(problems: Mapping[Site, LayerProblem], ids: Mapping[str, UInt8[Tensor, "_"]]) -> dict[Site, list[Tensor]]:
    """All that layers store beside codebooks, with the `group_ids` of the problems."""
    held: dict[Site, list[Tensor]] = {}
    for site, problem in problems.items():
        outliers = problem.outliers.tensors().values() if problem.outliers else ()
        transform = problem.transform.stored() if problem.transform else ()
        held[site] = [*([ids[site.reads]] if site.reads in ids else ()), *transform, *outliers]
    return held


def held_bits(held: Held) -> int:
    """The bits of all tensors, each counted once."""
    return sum(8 * nbytes for nbytes in {id(t): t.nbytes for tensors in held.values() for t in tensors}.values())


def bits_by_layer(held: Held, table_groups: Sequence[TableGroup], table: RateTable, chosen: Sequence[int]) -> dict[Site, float]:
    """The stored bits a weight of every layer; what layers share is split between them by their weights."""
    bits: dict[Site, float] = defaultdict(float)
    for u, table_group in enumerate(table_groups):
        for channel_slice in table_group.slices:
            share = channel_slice.num_weights / table_group.info.num_weights
            bits[channel_slice.site] += share * int(table.bits[u, chosen[u]])
    sharing: dict[int, list[Site]] = defaultdict(list)
    for site, tensors in held.items():
        for tensor in tensors:
            sharing[id(tensor)].append(site)
    for site, tensors in held.items():
        for tensor in tensors:
            share = site.num_weights / sum(other.num_weights for other in sharing[id(tensor)])
            bits[site] += share * 8 * tensor.nbytes
    return {site: total / site.num_weights for site, total in bits.items()}
