"""What a quantised model is reported with: its stored layers, their bits, and six tables."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
from torch import Tensor

from mgvq.protocols import QuantizedWeight
from mgvq.quantization.rounding import Rounded
from mgvq.quantization.table_groups import TableGroup
from mgvq.types import LayerProblem, RateTable, Site


@dataclass(frozen=True)
class QuantReport:
    """What `quantize` gives; the columns of its tables are explained in docs/run_folder.md."""

    weights: Mapping[Site, QuantizedWeight]
    stored_bits: int  # predicted; the ledger of the checkpoint must count the same
    layers: pd.DataFrame  # a row for every layer
    proxy: pd.DataFrame  # a row for every layer and step of its rounding
    allocation: pd.DataFrame  # a row for every channel slice
    channels: pd.DataFrame  # a row for every input channel
    blocks: pd.DataFrame  # a row for every trial of the block loop; empty without one
    flags: tuple[str, ...]  # fallbacks that were taken
    seconds: float  # of quantising
    parameters: Mapping[str, Tensor] = field(default_factory=dict)  # others that were tuned, by name, as they are stored
    tuning: pd.DataFrame = field(default_factory=pd.DataFrame)  # a row for every check of a tuning; empty without one
    tune_seconds: float = 0.0  # of tuning the whole model; that of blocks is part of quantising


def layers_table(problems: Mapping[Site, LayerProblem], rounded: Rounded) -> pd.DataFrame:
    """Stored bits, relative squared error, proxy error in the end (NaN without a metric) and the limit of each layer."""
    rows = []
    for site, problem in problems.items():
        weight = problem.in_own_basis(problem.weight.float())
        relative = (rounded.weight(site).to(weight) - weight).square().sum() / weight.square().sum().clamp(min=1e-30)
        proxy = list(rounded.proxy[site].values())[-1] if rounded.proxy[site] else float("nan")
        limit = rounded.limits[site]
        errors = {"relative_error": relative.item(), "proxy_error": proxy, "limit": limit.limit, "times_limit": limit.times}
        rows.append({**_place(site), "num_weights": site.num_weights, "bits": limit.bits, **errors})
    return pd.DataFrame(rows)


def proxy_table(sites: Iterable[Site], rounded: Rounded) -> pd.DataFrame:
    """The proxy error of each layer after every step of `LayerRounder.round`, in their order; empty without a metric."""
    return pd.DataFrame(
        [{**_place(site), "part": step, "proxy_error": error} for site in sites for step, error in rounded.proxy[site].items()]
    )


def _place(site: Site) -> dict[str, object]:
    return {"site": site.name, "tower": site.tower, "kind": site.kind, "block": site.block}


def allocation_table(table_groups: Sequence[TableGroup], table: RateTable, chosen: Sequence[int]) -> pd.DataFrame:
    """A row for every channel slice; `unit_bits`, `predicted_loss` and `score` are of its whole table group (`unit`)."""
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


def channels_table(problems: Mapping[Site, LayerProblem]) -> pd.DataFrame:
    """Score and group of every input channel."""
    parts = [
        pd.DataFrame({"site": s.name, "channel": range(s.in_features), "score": p.score.numpy(), "group": p.groups.numpy()})
        for s, p in problems.items()
    ]
    return pd.concat(parts, ignore_index=True)
