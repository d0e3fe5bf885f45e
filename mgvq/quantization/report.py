"""What a quantised model is reported with: its stored layers, their bits, and five tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from torch import Tensor

from mgvq.protocols import QuantizedWeight
from mgvq.quantization.rounding import Rounded
from mgvq.quantization.table_groups import TableGroup
from mgvq.types import RateTable, Site


@dataclass(frozen=True)
class QuantReport:
    """The quantised layers; the bits they were predicted to take; tables by layer, part, piece, channel, block; fallbacks;
    seconds."""

    weights: Mapping[Site, QuantizedWeight]
    stored_bits: int
    layers: pd.DataFrame
    proxy: pd.DataFrame
    allocation: pd.DataFrame
    channels: pd.DataFrame
    blocks: pd.DataFrame
    flags: tuple[str, ...]
    seconds: float


def layers_table(sites: Sequence[Site], weights: Mapping[Site, Tensor], rounded: Rounded) -> pd.DataFrame:
    """Relative squared error of each layer's weight, and its proxy error in the end (NaN without a metric)."""
    rows = []
    for site in sites:
        weight = weights[site].float()
        relative = (rounded.decoded[site].to(weight) - weight).square().sum() / weight.square().sum().clamp(min=1e-30)
        proxy = list(rounded.proxy[site].values())[-1] if rounded.proxy[site] else float("nan")
        rows.append({**_place(site), "num_weights": site.num_weights, "relative_error": relative.item(), "proxy_error": proxy})
    return pd.DataFrame(rows)


def proxy_table(sites: Sequence[Site], rounded: Rounded) -> pd.DataFrame:
    """The proxy error of each layer by part (`Layers.round`), in the order of the parts; empty without a metric."""
    return pd.DataFrame(
        [{**_place(site), "part": part, "proxy_error": error} for site in sites for part, error in rounded.proxy[site].items()]
    )


def _place(site: Site) -> dict[str, object]:
    return {"site": site.name, "tower": site.tower, "kind": site.kind, "block": site.block}


def allocation_table(table_groups: Sequence[TableGroup], table: RateTable, chosen: Sequence[int]) -> pd.DataFrame:
    """A row a piece; what belongs to the unit (`unit_bits`, `predicted_loss`, `score`) is the same in all rows of the unit."""
    rows = []
    for u, table_group in enumerate(table_groups):
        info, rate = table_group.info, table.rates[chosen[u]]
        known = {"depth": info.depth, "quantile": info.quantile, "score": info.score, "rate": rate.name}
        costs = {"index_bits": rate.index_bits, "unit_bits": int(table.bits[u, chosen[u]])}
        loss = {"predicted_loss": float(table.loss[u, chosen[u]])}
        for p in table_group.slices:
            where = {"unit": info.name, "site": p.site.name, "group": p.group, "tower": p.site.tower, "kind": p.site.kind}
            sizes = {"block": p.site.block, "num_channels": len(p.columns), "num_weights": p.num_weights}
            rows.append({**where, **sizes, **known, **costs, **loss})
    return pd.DataFrame(rows)


def channels_table(scores: Mapping[Site, Tensor], groups: Mapping[Site, Tensor]) -> pd.DataFrame:
    """Score and group of every input channel."""
    parts = [
        pd.DataFrame({"site": s.name, "channel": range(len(score)), "score": score.numpy(), "group": groups[s].numpy()})
        for s, score in scores.items()
    ]
    return pd.concat(parts, ignore_index=True)
