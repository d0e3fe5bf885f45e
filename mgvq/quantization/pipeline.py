"""`quantize()`: the algorithm in one screen. No Hydra, no files, no tracking."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mgvq.errors import UserError
from mgvq.formats.outliers import Outliers
from mgvq.model.blocks import block_name, by_block
from mgvq.model.lazy import Lazy
from mgvq.model.sites import site_weights
from mgvq.model.streamed import StreamedWeights
from mgvq.progress import progress
from mgvq.protocols import LayerTransform
from mgvq.quantization.blockwise import blockwise_rounding
from mgvq.quantization.codebooks import CodebookCache, rate_table
from mgvq.quantization.limits import Limits
from mgvq.quantization.method import Method
from mgvq.quantization.outliers import find_outliers
from mgvq.quantization.preflight import constant_layers, unused_budget, without_weights
from mgvq.quantization.report import QuantReport, allocation_table, channels_table, layers_table, proxy_table
from mgvq.quantization.rounding import LayerRounder, Rounded
from mgvq.quantization.sequential import sequential_rounding
from mgvq.quantization.storage import bits_by_layer, group_ids, held_bits, held_by
from mgvq.quantization.subject import Samples, Subject
from mgvq.quantization.table_groups import cut_table_groups
from mgvq.quantization.tuning import BlockTuner, tuned
from mgvq.ranks.ranks import ALONE, Ranks
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
    streamed: StreamedWeights | None = None,
    ranks: Ranks = ALONE,
) -> QuantReport:
    """Quantise, and tune, the weights of `sites` at `bits_per_weight` stored bits; `model` itself stays as it is.

    `bank` holds what `method.needs` asks for, `samples` are there if `method.runs_on_samples`. `finished` holds the blocks that
    an earlier start has rounded, and is given the others one by one, where layers are rounded block by block, no table is shared
    between blocks, and no block is tuned: the norms that a tuning moves are no part of an entry. What a tuning moves beside the
    layers' own tensors is stored in `stored_dtype`. `streamed` is there where the model's blocks are not in memory: the problems
    of one block are then made at a time, and rounded layers are kept packed; the result has the same bits. Several processes
    (`ranks`) are given the same, share the work, and have the same result; a tuning is done by each of them alike. Raises
    UserError for weights or scores that are not finite, where the budget cannot be met, and for a streamed model whose blocks
    share tables.
    """
    start = time.perf_counter()
    weights = streamed.originals(sites) if streamed else site_weights(model, sites)
    flags = constant_layers(weights)
    problems = layer_problems(weights, bank, method, one_block=streamed is not None)

    table_groups = cut_table_groups(problems.outlines, method.codebook)
    between = any(len({block_name([s.site]) for s in group.slices}) > 1 for group in table_groups)
    if streamed and between:
        raise UserError(
            "memory=streamed has one block in memory, and a table that layers of several blocks share is fitted to all of them: "
            "set codebook.share=layer, or memory=resident."
        )
    cache = CodebookCache(table_groups, method.codebook, problems)
    table = rate_table(cache, method.allocation.distortion)
    ids = group_ids(problems.outlines)
    held = held_by(problems.outlines, ids)
    beside = held_bits(held)
    budget_bits = int(bits_per_weight * sum(s.num_weights for s in sites)) - beside
    chosen = method.allocation(table, budget_bits).tolist()
    stored_bits = beside + sum(int(table.bits[u, r]) for u, r in enumerate(chosen))
    flags += unused_budget(stored_bits, budget_bits + beside)
    rates = [table.rates[r] for r in chosen]

    limits = Limits(bits_by_layer(held, table_groups, table, chosen))
    # What blocks that are rounded one by one have in common would be an object of its own in each process.
    dealt_to = ALONE if method.is_blockwise and between else ranks
    rounder = LayerRounder(cache, rates, method.compensation, method.refit, ids, limits, dealt_to)
    blocks = pd.DataFrame()
    tuner = None
    if not method.is_blockwise:
        rounded = Rounded()
        for part in [sites] if between else progress(list(by_block(sites)), "blocks"):
            own = rounder.round(part, flags)
            rounded |= own.packed() if streamed else own
    else:
        assert samples is not None, "runs/method.py asks for a calibration set"
        if between:
            finished = None  # a table is one object in all layers that share it, which files of single blocks cannot tell
        subject = Subject(model, sites, samples, streamed, ranks)
        if method.shift is not None:
            rounded, blocks = blockwise_rounding(subject, bank, method.shift, rounder, flags, finished)
        else:
            if method.tuning is not None and method.tunes_blocks:
                finished = None
                tuner = BlockTuner(model, sites, method.tuning, table_groups, stored_dtype)
            rounded = sequential_rounding(subject, method.prefix, rounder, flags, finished, tuner)
    report = QuantReport(
        weights={site: rounded.stored[site] for site in sites},
        stored_bits=stored_bits,
        layers=layers_table(problems, rounded),
        proxy=proxy_table(problems, rounded),
        allocation=allocation_table(table_groups, table, chosen),
        channels=channels_table(problems.outlines),
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


@dataclass(frozen=True)
class LayerProblems(Mapping[Site, LayerProblem]):
    """The problems of all layers, in their order."""

    outlines: Mapping[Site, LayerProblem]  # the same without weights and metrics: scores, groups, what is stored beside
    whole: Mapping[Site, LayerProblem]

    def __getitem__(self, site: Site) -> LayerProblem:
        return self.whole[site]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.outlines)

    def __len__(self) -> int:
        return len(self.outlines)


def layer_problems(weights: Mapping[Site, Tensor], bank: StatsBank, method: Method, *, one_block: bool = False) -> LayerProblems:
    """What the curvature, the sensitivity and the grouping make of the layers: a problem for each, in the order of `weights`.

    Outliers are taken out first, by the metric of the layers as they are, so that no stage sees them.

    The problems hold copies: the model's own weights change as its blocks are quantised. With `one_block` they are made when they
    are asked for, and those of one block are kept at a time; `weights` and `bank` are read again for every stage that looks at
    them. Raises UserError for weights or scores that are not finite, and for negative scores.
    """
    each = Lazy if one_block else _each
    if bad := [s.name for s, w in weights.items() if not torch.isfinite(w).all()]:
        raise UserError(f"{len(bad)} layers have weights that are not finite, the first {bad[0]}: the model's files are damaged.")
    transform, transforms = method.transform, {}
    outliers = _outliers(method, weights, bank) if method.outliers else {}
    weights = _without(weights, outliers, each)
    if transform and transform.within == "layer":
        transforms = transform(list(weights), None)
        weights, bank = _transformed(weights, bank, transforms, each)
    scores = _scores(method, weights, bank)
    groups = method.grouping(scores, bank)
    if transform and transform.within == "group":
        transforms = transform(list(weights), groups)
        weights, bank = _transformed(weights, bank, transforms, each)
        scores = _scores(method, weights, bank)
    metrics = method.curvature.fuse(bank) if method.curvature and not (one_block and _replaces_metrics(method)) else {}
    outlines = {
        site: without_weights(site, scores[site], groups[site], transforms.get(site), outliers.get(site)) for site in weights
    }

    def whole(site: Site) -> LayerProblem:
        weight = weights[site]
        return replace(outlines[site], weight=weight, target=weight, metric=metrics.get(site))

    if one_block:
        return LayerProblems(outlines, Lazy(outlines, whole, together=lambda site: block_name([site])))
    return LayerProblems(outlines, _each(outlines, whole))


@runtime_checkable
class _Each(Protocol):
    """How a value for every layer comes about: all of them at once, or each when it is asked for (`Lazy`)."""

    def __call__(self, keys: Iterable[Site], make: Callable[[Site], Any], /) -> Mapping[Site, Any]: ...


def _each(sites: Iterable[Site], make: Callable[[Site], Any]) -> dict[Site, Any]:
    return {site: make(site) for site in sites}


def _replaces_metrics(method: Method) -> bool:
    """Whether the metrics at full precision are looked at by nobody: a prefix takes the input factors anew before a block is
    rounded, and tables are fitted after that. To read and turn them would be in vain."""
    curvature = method.curvature
    measured = method.allocation.distortion == "measured"
    return method.prefix is not None and curvature is not None and not curvature.has_output_factor and not measured


def _outliers(method: Method, weights: Mapping[Site, Tensor], bank: StatsBank) -> dict[Site, Outliers]:
    metrics = method.curvature.fuse(bank) if method.curvature else {}
    return {site: find_outliers(weight, metrics.get(site), method.outliers) for site, weight in weights.items()}


def _without(weights: Mapping[Site, Tensor], outliers: Mapping[Site, Outliers], each: _Each) -> Mapping[Site, Tensor]:
    """Copies of the weights less their outliers, in their own dtypes."""

    def rest(site: Site) -> Tensor:
        weight, own = weights[site], outliers.get(site)
        return weight.clone() if own is None else (weight.float() - own.dense()).to(weight.dtype)

    return each(weights, rest)


def _scores(method: Method, weights: Mapping[Site, Tensor], bank: StatsBank) -> dict[Site, Tensor]:
    scores = {site: score.cpu() for site, score in method.sensitivity(weights, bank).items()}
    if bad := [s.name for s, score in scores.items() if not (torch.isfinite(score).all() and (score >= 0).all())]:
        raise UserError(f"sensitivity: {len(bad)} layers have scores that are negative or not finite, the first {bad[0]}.")
    return scores


def _transformed(
    weights: Mapping[Site, Tensor], bank: StatsBank, transforms: Mapping[Site, LayerTransform], each: _Each
) -> tuple[Mapping[Site, Tensor], StatsBank]:
    """The weights and the statistics in the turned bases."""
    return (
        each(weights, lambda site: transforms[site].weight(weights[site])),
        each(bank, lambda site: transforms[site].statistics(bank[site])),
    )
