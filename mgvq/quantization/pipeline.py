"""`quantize()`: the algorithm in one screen. No Hydra, no files, no tracking."""

import time
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mgvq.errors import UserError
from mgvq.formats.outliers import Outliers
from mgvq.model.blocks import block_name
from mgvq.model.sites import site_weights
from mgvq.protocols import LayerTransform
from mgvq.quantization.blockwise import Samples, blockwise_rounding
from mgvq.quantization.codebooks import CodebookCache, rate_table
from mgvq.quantization.limits import Limits
from mgvq.quantization.method import Method
from mgvq.quantization.outliers import find_outliers
from mgvq.quantization.preflight import constant_layers, unused_budget
from mgvq.quantization.report import QuantReport, allocation_table, channels_table, layers_table, proxy_table
from mgvq.quantization.rounding import LayerRounder
from mgvq.quantization.sequential import sequential_rounding
from mgvq.quantization.storage import bits_by_layer, group_ids, held_bits, held_by
from mgvq.quantization.table_groups import cut_table_groups
from mgvq.quantization.tuning import BlockTuner, tuned
from mgvq.types import LayerProblem, Site, StatsBank


def quantize(
    model: PreTrainedModel,
    sites: Sequence[Site],
    bank: StatsBank,
    method: Method,
    bits_per_weight: float,
    samples: Samples | None,
    finished: MutableMapping[str, Any] | None = None,
    stored_dtype: torch.dtype = torch.float32,
) -> QuantReport:
    """Quantise, and tune, the weights of `sites` at `bits_per_weight` stored bits; `model` itself stays as it is.

    `bank` holds what `method.needs` asks for, `samples` are there if `method.runs_on_samples`. `finished` holds the blocks that
    an earlier start has rounded, and is given the others one by one, where layers are rounded block by block, no table is shared
    between blocks, and no block is tuned: the norms that a tuning moves are no part of an entry. What a tuning moves beside the
    layers' own tensors is stored in `stored_dtype`. Raises UserError for weights or scores that are not finite, and where the
    budget cannot be met.
    """
    start = time.perf_counter()
    weights = site_weights(model, sites)
    flags = constant_layers(weights)
    problems = layer_problems(weights, bank, method)

    table_groups = cut_table_groups(problems, method.codebook)
    cache = CodebookCache(table_groups, method.codebook, problems)
    table = rate_table(cache, method.allocation.distortion)
    ids = group_ids(problems)
    held = held_by(problems, ids)
    beside = held_bits(held)
    budget_bits = int(bits_per_weight * sum(s.num_weights for s in sites)) - beside
    chosen = method.allocation(table, budget_bits).tolist()
    stored_bits = beside + sum(int(table.bits[u, r]) for u, r in enumerate(chosen))
    flags += unused_budget(stored_bits, budget_bits + beside)
    rates = [table.rates[r] for r in chosen]

    limits = Limits(bits_by_layer(held, table_groups, table, chosen))
    rounder = LayerRounder(method.compensation, method.refit, ids, limits)
    blocks = pd.DataFrame()
    tuner = None
    if not method.is_blockwise:
        rounded = rounder.round(cache, rates, sites, flags)
    else:
        assert samples is not None, "runs/method.py asks for a calibration set"
        if any(len({block_name([s.site]) for s in group.slices}) > 1 for group in table_groups):
            finished = None  # a table is one object in all layers that share it, which files of single blocks cannot tell
        if method.shift is not None:
            rounded, blocks = blockwise_rounding(
                model, sites, bank, method.shift, samples, cache, rates, rounder, flags, finished
            )
        else:
            if method.tuning is not None and method.tunes_blocks:
                finished = None
                tuner = BlockTuner(model, sites, method.tuning, table_groups, stored_dtype)
            rounded = sequential_rounding(model, sites, method.prefix, samples, cache, rates, rounder, flags, finished, tuner)
    report = QuantReport(
        weights={site: rounded.stored[site] for site in sites},
        stored_bits=stored_bits,
        layers=layers_table(problems, rounded),
        proxy=proxy_table(problems, rounded),
        allocation=allocation_table(table_groups, table, chosen),
        channels=channels_table(problems),
        blocks=blocks,
        flags=tuple(flags),
        seconds=time.perf_counter() - start,
        parameters=tuner.parameters if tuner else {},
        tuning=pd.concat(tuner.tables, ignore_index=True) if tuner else pd.DataFrame(),
    )
    if method.tuning is None or method.tunes_blocks:
        return report
    assert samples is not None, "runs/method.py asks for a calibration set"
    return tuned(model, sites, report, method.tuning, samples, stored_dtype)


def layer_problems(weights: Mapping[Site, Tensor], bank: StatsBank, method: Method) -> dict[Site, LayerProblem]:
    """What the curvature, the sensitivity and the grouping make of the layers: a problem for each, in the order of `weights`.

    Outliers are taken out first, by the metric of the layers as they are, so that no stage sees them.

    The problems hold copies: the model's own weights change as its blocks are quantised. Raises UserError for weights or scores
    that are not finite, and for negative scores.
    """
    if bad := [s.name for s, w in weights.items() if not torch.isfinite(w).all()]:
        raise UserError(f"{len(bad)} layers have weights that are not finite, the first {bad[0]}: the model's files are damaged.")
    transform, transforms = method.transform, {}
    outliers = _outliers(method, weights, bank) if method.outliers else {}
    weights = {site: _without(weight, outliers.get(site)) for site, weight in weights.items()}
    if transform and transform.within == "layer":
        transforms = transform(list(weights), None)
        weights, bank = _transformed(weights, bank, transforms)
    scores = _scores(method, weights, bank)
    groups = method.grouping(scores, bank)
    if transform and transform.within == "group":
        transforms = transform(list(weights), groups)
        weights, bank = _transformed(weights, bank, transforms)
        scores = _scores(method, weights, bank)
    metrics = method.curvature.fuse(bank) if method.curvature else {}
    return {
        site: LayerProblem(
            site=site,
            weight=weight,
            target=weight,
            metric=metrics.get(site),
            score=scores[site],
            groups=groups[site],
            transform=transforms.get(site),
            outliers=outliers.get(site),
        )
        for site, weight in weights.items()
    }


def _outliers(method: Method, weights: Mapping[Site, Tensor], bank: StatsBank) -> dict[Site, Outliers]:
    metrics = method.curvature.fuse(bank) if method.curvature else {}
    return {site: find_outliers(weight, metrics.get(site), method.outliers) for site, weight in weights.items()}


def _without(weight: Tensor, outliers: Outliers | None) -> Tensor:
    """A copy of the weight less its outliers, in its own dtype."""
    return weight.clone() if outliers is None else (weight.float() - outliers.dense()).to(weight.dtype)


def _scores(method: Method, weights: Mapping[Site, Tensor], bank: StatsBank) -> dict[Site, Tensor]:
    scores = {site: score.cpu() for site, score in method.sensitivity(weights, bank).items()}
    if bad := [s.name for s, score in scores.items() if not (torch.isfinite(score).all() and (score >= 0).all())]:
        raise UserError(f"sensitivity: {len(bad)} layers have scores that are negative or not finite, the first {bad[0]}.")
    return scores


def _transformed(
    weights: Mapping[Site, Tensor], bank: StatsBank, transforms: Mapping[Site, LayerTransform]
) -> tuple[dict[Site, Tensor], StatsBank]:
    """The weights and the statistics in the turned bases."""
    return (
        {site: transforms[site].weight(weight) for site, weight in weights.items()},
        {site: transforms[site].statistics(stats) for site, stats in bank.items()},
    )
