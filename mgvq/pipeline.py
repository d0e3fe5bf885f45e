"""`quantize()`: the algorithm in one screen. No Hydra, no files, no tracking."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mgvq.errors import UserError
from mgvq.formats.grouped import pack_groups
from mgvq.model.sites import site_weights
from mgvq.protocols import Allocation, Codebook, Compensation, Curvature, Grouping, QuantizedWeight, Refit, Sensitivity, Shift
from mgvq.rounding import Layers, Rounded
from mgvq.shifting import Samples, shifted_rounding
from mgvq.types import Needs, RateTable, Site, StatsBank
from mgvq.units import Fits, Unit, cut_units, rate_table


@dataclass(frozen=True, kw_only=True)
class Method:
    """One variant of each stage: together a quantisation method."""

    curvature: Curvature | None
    sensitivity: Sensitivity
    grouping: Grouping
    allocation: Allocation
    codebook: Codebook
    compensation: Compensation
    refit: Refit | None = None

    @property
    def shift(self) -> Shift | None:
        """The compensation, where it moves its targets by a gradient."""
        return self.compensation if isinstance(self.compensation, Shift) else None

    @property
    def needs(self) -> Needs:
        """The statistics that its stages read."""
        curvature = self.curvature.needs if self.curvature else Needs()
        static = Needs(gradients=self.shift is not None and not self.shift.refresh)
        return curvature | static | self.sensitivity.needs | self.grouping.needs


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


def quantize(
    model: PreTrainedModel,
    sites: Sequence[Site],
    bank: StatsBank,
    method: Method,
    bits_per_weight: float,
    samples: Samples | None,
) -> QuantReport:
    """Quantise the weights of `sites` to `bits_per_weight` stored bits; `model` itself stays as it is.

    `bank` holds what `method.needs` asks for, `samples` are there if `method.compensation` moves its targets by a gradient.
    Raises UserError for weights that are not finite, and where the budget cannot be met.
    """
    start = time.perf_counter()
    weights = site_weights(model, sites)
    if bad := [s.name for s, w in weights.items() if not torch.isfinite(w).all()]:
        raise UserError(f"{len(bad)} layers have weights that are not finite, the first {bad[0]}: the model's files are damaged.")
    flags: list[str] = []
    metrics = method.curvature.fuse(bank) if method.curvature else {}
    scores = {site: score.cpu() for site, score in method.sensitivity(weights, bank).items()}
    if bad := [s.name for s, score in scores.items() if not (torch.isfinite(score).all() and (score >= 0).all())]:
        raise UserError(f"sensitivity: {len(bad)} layers have scores that are negative or not finite, the first {bad[0]}.")
    groups = method.grouping(scores, bank)

    units = cut_units(groups, scores, method.codebook)
    whole = method.codebook.needs_gram
    energies = {site: metric.mean_gram() if whole else metric.channel_energy() for site, metric in metrics.items()}
    fits = Fits(units, method.codebook, weights, energies)
    table = rate_table(fits, scores, method.allocation.distortion)
    ids = {site.reads: pack_groups(group) for site, group in groups.items() if group.max() > 0}
    id_bits = sum(8 * packed.nbytes for packed in ids.values())
    budget_bits = int(bits_per_weight * sum(s.num_weights for s in sites)) - id_bits
    chosen = method.allocation(table, budget_bits).tolist()
    rates = [table.rates[r] for r in chosen]

    layers = Layers(method.compensation, method.refit, weights, metrics, scores, ids)
    if method.shift is None:
        rounded, blocks = layers.round(fits, rates, sites, flags), pd.DataFrame()
    else:
        assert samples is not None, "runs/method.py asks for a calibration set"
        rounded, blocks = shifted_rounding(model, sites, bank, method.shift, samples, fits, rates, layers, flags)
    return QuantReport(
        weights={site: rounded.stored[site] for site in sites},
        stored_bits=id_bits + sum(int(table.bits[u, r]) for u, r in enumerate(chosen)),
        layers=_layers(sites, weights, rounded),
        proxy=_proxy(sites, rounded),
        allocation=_allocation(units, table, chosen),
        channels=_channels(scores, groups),
        blocks=blocks,
        flags=tuple(flags),
        seconds=time.perf_counter() - start,
    )


def _layers(sites: Sequence[Site], weights: Mapping[Site, Tensor], rounded: Rounded) -> pd.DataFrame:
    """Relative squared error of each layer's weight, and its proxy error in the end (NaN without a metric)."""
    rows = []
    for site in sites:
        weight = weights[site].float()
        relative = (rounded.decoded[site].to(weight) - weight).square().sum() / weight.square().sum().clamp(min=1e-30)
        proxy = list(rounded.proxy[site].values())[-1] if rounded.proxy[site] else float("nan")
        rows.append({**_place(site), "num_weights": site.num_weights, "relative_error": relative.item(), "proxy_error": proxy})
    return pd.DataFrame(rows)


def _proxy(sites: Sequence[Site], rounded: Rounded) -> pd.DataFrame:
    """The proxy error of each layer by part (`Layers.round`), in the order of the parts; empty without a metric."""
    return pd.DataFrame(
        [{**_place(site), "part": part, "proxy_error": error} for site in sites for part, error in rounded.proxy[site].items()]
    )


def _place(site: Site) -> dict[str, object]:
    return {"site": site.name, "tower": site.tower, "kind": site.kind, "block": site.block}


def _allocation(units: Sequence[Unit], table: RateTable, chosen: Sequence[int]) -> pd.DataFrame:
    """A row a piece; what belongs to the unit (`unit_bits`, `predicted_loss`, `score`) is the same in all rows of the unit."""
    rows = []
    for u, unit in enumerate(units):
        info, rate = unit.info, table.rates[chosen[u]]
        known = {"depth": info.depth, "quantile": info.quantile, "score": info.score, "rate": rate.name}
        costs = {"index_bits": rate.index_bits, "unit_bits": int(table.bits[u, chosen[u]])}
        loss = {"predicted_loss": float(table.loss[u, chosen[u]])}
        for p in unit.pieces:
            where = {"unit": info.name, "site": p.site.name, "group": p.group, "tower": p.site.tower, "kind": p.site.kind}
            sizes = {"block": p.site.block, "num_channels": len(p.columns), "num_weights": p.num_weights}
            rows.append({**where, **sizes, **known, **costs, **loss})
    return pd.DataFrame(rows)


def _channels(scores: Mapping[Site, Tensor], groups: Mapping[Site, Tensor]) -> pd.DataFrame:
    """Score and group of every input channel."""
    parts = [
        pd.DataFrame({"site": s.name, "channel": range(len(score)), "score": score.numpy(), "group": groups[s].numpy()})
        for s, score in scores.items()
    ]
    return pd.concat(parts, ignore_index=True)
