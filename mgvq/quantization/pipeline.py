"""`quantize()`: the algorithm in one screen. No Hydra, no files, no tracking."""

import time
from collections.abc import Sequence

import pandas as pd
import torch
from transformers import PreTrainedModel

from mgvq.errors import UserError
from mgvq.formats.grouped import pack_groups
from mgvq.model.sites import site_weights
from mgvq.quantization.blockwise import Samples, shifted_rounding
from mgvq.quantization.codebooks import CodebookCache, rate_table
from mgvq.quantization.method import Method
from mgvq.quantization.preflight import constant_layers, unused_budget
from mgvq.quantization.report import QuantReport, allocation_table, channels_table, layers_table, proxy_table
from mgvq.quantization.rounding import LayerRounder
from mgvq.quantization.table_groups import cut_table_groups
from mgvq.types import Site, StatsBank


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
    flags = constant_layers(weights)
    metrics = method.curvature.fuse(bank) if method.curvature else {}
    scores = {site: score.cpu() for site, score in method.sensitivity(weights, bank).items()}
    if bad := [s.name for s, score in scores.items() if not (torch.isfinite(score).all() and (score >= 0).all())]:
        raise UserError(f"sensitivity: {len(bad)} layers have scores that are negative or not finite, the first {bad[0]}.")
    groups = method.grouping(scores, bank)

    table_groups = cut_table_groups(groups, scores, method.codebook)
    whole = method.codebook.needs_gram
    importances = {site: metric.mean_gram() if whole else metric.channel_importance() for site, metric in metrics.items()}
    cache = CodebookCache(table_groups, method.codebook, weights, importances)
    table = rate_table(cache, scores, method.allocation.distortion)
    ids = {site.reads: pack_groups(group) for site, group in groups.items() if group.max() > 0}
    id_bits = sum(8 * packed.nbytes for packed in ids.values())
    budget_bits = int(bits_per_weight * sum(s.num_weights for s in sites)) - id_bits
    chosen = method.allocation(table, budget_bits).tolist()
    stored_bits = id_bits + sum(int(table.bits[u, r]) for u, r in enumerate(chosen))
    flags += unused_budget(stored_bits, budget_bits + id_bits)
    rates = [table.rates[r] for r in chosen]

    layers = LayerRounder(method.compensation, method.refit, weights, metrics, scores, ids)
    if method.shift is None:
        rounded, blocks = layers.round(cache, rates, sites, flags), pd.DataFrame()
    else:
        assert samples is not None, "runs/method.py asks for a calibration set"
        rounded, blocks = shifted_rounding(model, sites, bank, method.shift, samples, cache, rates, layers, flags)
    return QuantReport(
        weights={site: rounded.stored[site] for site in sites},
        stored_bits=stored_bits,
        layers=layers_table(sites, weights, rounded),
        proxy=proxy_table(sites, rounded),
        allocation=allocation_table(table_groups, table, chosen),
        channels=channels_table(scores, groups),
        blocks=blocks,
        flags=tuple(flags),
        seconds=time.perf_counter() - start,
    )
