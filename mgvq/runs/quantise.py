"""What all processes of a run do together: the statistics and the quantisation of a model that is loaded."""

import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from mgvq.calibration.examples import further_batches, further_examples
from mgvq.compiled import set_num_threads
from mgvq.curvature.block_statistics import collect_by_block
from mgvq.curvature.statistics import collect
from mgvq.errors import SharedFault, UserError
from mgvq.memory import map_large
from mgvq.model.blocks import Block
from mgvq.model.device import find_device
from mgvq.model.load import Loaded, load
from mgvq.model.pack import can_pack, packed_batches
from mgvq.model.sites import list_sites
from mgvq.protocols import CalibrationSet
from mgvq.quantization.method import Method
from mgvq.quantization.pipeline import quantize
from mgvq.quantization.report import QuantReport
from mgvq.quantization.subject import Samples
from mgvq.ranks.ranks import Ranks
from mgvq.runs.build import build
from mgvq.runs.cache import statistics, statistics_by_block
from mgvq.runs.device import device_name
from mgvq.runs.files import disk_faults_told
from mgvq.runs.identity import run_id, scientific_settings
from mgvq.runs.method import build_method
from mgvq.runs.processes import OfTheFirst, local_rank
from mgvq.types import Site, SiteStats

IMAGES = 32  # in a packed batch; fixed: gradients would move in the last digit with it
WHETHER = "whether there is anything to quantise"  # what the first process tells the others
log = logging.getLogger(__name__)


def set_up(cfg: DictConfig, ranks: Ranks) -> torch.device:
    """Set torch as the run is named by: threads, repeatable algorithms, arithmetic; its device. What is freed goes back to the
    system at once where memory is what the run is short of.

    Of several processes each takes an accelerator of its own where the setting names none, as far as there are as many. Raises
    SharedFault where PyTorch has no such device.
    """
    if cfg.memory == "streamed":
        map_large()
    torch.set_num_threads(cfg.threads)
    set_num_threads(cfg.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    name = device_name(cfg.device)
    if ranks.size > 1 and name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{local_rank() % torch.cuda.device_count()}"
    try:
        device = find_device(name)
    except UserError as error:
        raise SharedFault(str(error)) from error
    if device.type == "cuda" and ranks.size > 1:
        torch.cuda.set_device(device)  # where tensors of other processes go
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.tf32
    return device


def assist(cfg: DictConfig, ranks: Ranks) -> None:
    """What a process does that is not the first of its run: its share of the statistics and of the rounding, where there is
    anything to quantise. It writes nothing, and keeps nothing."""
    method, device = build_method(cfg), set_up(cfg, ranks)
    if not ranks.first(WHETHER, bool):
        return
    assert method is not None, "the first process has said so"
    calibration = build(cfg, "calibration")
    drawn = calibration.draw() if calibration else None
    loaded = load(build(cfg, "model"), device, streamed=cfg.memory == "streamed")
    sites = list_sites(loaded.model, cfg.scope)
    bank = statistics_of(cfg, method, loaded, sites, drawn, ranks)
    quantised(cfg, method, loaded, sites, bank, drawn, {}, ranks)


def statistics_of(
    cfg: DictConfig, method: Method, loaded: Loaded, sites: Sequence[Site], drawn: CalibrationSet | None, ranks: Ranks
) -> Mapping[Site, SiteStats]:
    """Takes the statistics from the cache that all runs of the results folder share, or collects them from the samples; none of
    a method without calibration."""
    if drawn is None:
        return {}
    settings = scientific_settings(cfg)
    kept = ("model", "calibration", "scope", "threads", "device", "tf32", "numerics")
    key = {**{name: settings[name] for name in kept}, "needs": asdict(method.needs), "label_seed": drawn.label_seed}

    folder = Path(cfg.paths.results) / "cache" / "statistics"

    def compute() -> Mapping[Site, SiteStats]:
        batches, further = drawn.batches(loaded.processor), further_batches(drawn, loaded.processor)
        shares = ranks.share(batches), ranks.share(further)
        return collect(loaded.model, sites, shares[0], method.needs, drawn.label_seed, shares[1], ranks=ranks)

    def by_block(is_finished: Callable[[Block], bool], scratch: Path) -> Iterator[tuple[Block, Mapping[Site, SiteStats]]]:
        batches, further = drawn.batches(loaded.processor), further_batches(drawn, loaded.processor)
        data = (sites, batches, method.needs, drawn.label_seed, further)
        return collect_by_block(loaded.model, loaded.weights, *data, is_finished, scratch, ranks)

    if loaded.streamed is None:
        return statistics(folder, key, compute, sites, ranks)
    return statistics_by_block(folder, key, by_block, sites, ranks) if method.needs else {}


def quantised(
    cfg: DictConfig,
    method: Method,
    loaded: Loaded,
    sites: Sequence[Site],
    bank: Mapping[Site, SiteStats],
    drawn: CalibrationSet | None,
    finished: MutableMapping[str, Any] | None,
    ranks: Ranks,
) -> QuantReport:
    """The layers quantised as the settings say. `finished`: the journal of a method that goes block by block, which the first
    process has; what the others give is not looked at."""
    walked = None
    if drawn is not None and method.runs_on_samples:
        walked = samples_as_batches(loaded, drawn, for_grams=method.prefix is not None)
    if ranks.size > 1 and method.is_blockwise:
        finished = OfTheFirst(ranks, {} if finished is None else finished)
    bits, dtype, folder = cfg.budget.bits_per_weight, loaded.stored_dtype, Path(cfg.paths.results) / "partial" / run_id(cfg)
    if walked is not None:
        walked = replace(walked, folder=folder)
    with disk_faults_told(folder):
        return quantize(loaded.model, sites, bank, method, bits, walked, finished, dtype, loaded.streamed, ranks)


def samples_as_batches(loaded: Loaded, drawn: CalibrationSet, *, for_grams: bool) -> Samples:
    """The samples as batches, packed where the model allows it, which leaves a third of the tokens.

    The further samples that Grams see are among them where they are `for_grams`, as behind a quantised prefix.
    """
    processor = loaded.processor
    if drawn.packable and can_pack(loaded.model):
        examples = [*drawn.examples, *(further_examples(drawn) if for_grams else ())]
        parts = (packed_batches(processor, e, IMAGES) for e in (examples, drawn.heldout_examples))
    else:
        batches = chain(drawn.batches(processor), further_batches(drawn, processor) if for_grams else ())
        parts = (batches, drawn.heldout(processor))
    gradient, heldout = map(list, parts)
    return Samples(gradient, heldout)
