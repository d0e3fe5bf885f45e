"""One run from a configuration: load, quantise, save, load back, evaluate, write the folder."""

import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import PreTrainedModel

import mgvq
from mgvq.calibration.examples import further_examples
from mgvq.checkpoint.card import write_card
from mgvq.checkpoint.check import check_same_model
from mgvq.checkpoint.digests import write_digests
from mgvq.checkpoint.index import FIRST_SHARD
from mgvq.checkpoint.load import load as load_checkpoint
from mgvq.checkpoint.load import load_processor
from mgvq.checkpoint.packed import packed_layers
from mgvq.checkpoint.save import save
from mgvq.digest import file_digest
from mgvq.errors import UserError
from mgvq.memory import give_back
from mgvq.model.fit import check_samples
from mgvq.model.load import Described, Loaded, describe, load
from mgvq.model.shape import empty_model
from mgvq.model.sites import left_out_flags, list_sites
from mgvq.model.source import Source
from mgvq.model.streamed import share_equal
from mgvq.progress import peak_gb
from mgvq.protocols import Calibration, CalibrationSet, DrawsSamples, QuantizedWeight, ReadsData, Task
from mgvq.quantization.embeddings import round_embeddings
from mgvq.quantization.method import Method
from mgvq.quantization.preflight import predicted_bits
from mgvq.quantization.report import QuantReport
from mgvq.quantization.tuning import tuning_bytes
from mgvq.ranks.ranks import ALONE, Ranks
from mgvq.runs.build import build
from mgvq.runs.cache import reference
from mgvq.runs.identity import scientific_settings
from mgvq.runs.journal import Journal
from mgvq.runs.method import build_method, check_images
from mgvq.runs.provenance import provenance
from mgvq.runs.quantise import WHETHER, quantised, set_up, statistics_of
from mgvq.runs.reuse import QUANTIZATION, find_quantised, take_over
from mgvq.runs.score import scores
from mgvq.runs.store import SCHEMA_VERSION, RunFolder
from mgvq.types import EvalResult, Site

log = logging.getLogger(__name__)


def execute(cfg: DictConfig, folder: RunFolder, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Fills the folder and returns its metrics. Bad settings and bad data raise UserError before the model is loaded.

    Of several processes (`ranks`) this is the first, which alone writes and evaluates, while `quantise.assist` is the others.
    """
    job = _Job.of(cfg, folder, ranks)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    device = set_up(cfg, ranks)
    with folder:
        if folder.is_done():  # by another process, while this one was starting
            ranks.first(WHETHER, lambda: False)
            folder.discard_partial()
            return folder.metrics()
        other, origin = job.begin()
        described = job.check()
        ranks.first(WHETHER, lambda: job.method is not None and other is None)
        loaded = load(job.source, device, described, streamed=cfg.memory == "streamed")
        sites = list_sites(loaded.model, cfg.scope)
        flags, clock = [*job.source.flags(), *left_out_flags(loaded.model, sites)], Clock()
        report, rounded = None, {}
        if other is not None:
            log.info("taking over the checkpoint of %s, which differs in the evaluation alone", other.path)
            made = take_over(other, folder)
            give_back()
        else:
            report = job.quantise(loaded, sites, origin, clock) if job.method is not None else None
            give_back()
            rounded = round_embeddings(loaded.model, cfg.embedding_bits) if cfg.embedding_bits else {}
            made = job.save(loaded, sites, report, rounded, clock)
        log.info("evaluating %s", folder.checkpoint)
        clock.lap("save")
        model = job.load_back(loaded, device)
        if other is None:  # else the run that made the checkpoint has compared them, and its digests are as they were
            weights, parameters = _moved(report)
            check_same_model(loaded, weights, model, folder.checkpoint, rounded, parameters)
        give_back()
        digest = file_digest(folder.checkpoint / FIRST_SHARD)
        result = job.evaluate(loaded, model, digest)
        clock.lap("evaluate")
        folder.write_table("samples.parquet", result.samples)
        write_card(folder.checkpoint, loaded.licence, scores(result, cfg.evaluation))
        write_digests(folder.checkpoint)
        broken = [name for name, value in result.metrics.items() if not math.isfinite(value)]
        seconds = {**made["seconds"], "evaluate": clock.seconds["evaluate"]}
        metrics = {
            **result.metrics,
            **dict.fromkeys(broken),
            **made["sizes"],
            **{f"time/{name}_s": value for name, value in seconds.items()},
            "memory/peak_gb": peak_gb(),
            "rate": made["rate"],
            "checkpoint_sha256": digest,
            "flags": [*flags, *made["flags"], *result.flags, *_unexplained(broken, result.flags)],
            "schema_version": SCHEMA_VERSION,
        }
        folder.write_json("metrics.json", metrics)
    folder.discard_partial()
    return metrics


@dataclass(frozen=True)
class _Job:
    """The parts of a configuration, built, and the folder that they fill: each step of a run is a method."""

    cfg: DictConfig
    folder: RunFolder
    ranks: Ranks
    method: Method | None
    task: Task
    source: Source
    calibration: Calibration | None
    drawn: CalibrationSet | None

    @classmethod
    def of(cls, cfg: DictConfig, folder: RunFolder, ranks: Ranks) -> "_Job":
        """Builds the parts, and draws the samples."""
        method = build_method(cfg)
        task, source, calibration = (build(cfg, group) for group in ("evaluation", "model", "calibration"))
        if isinstance(task, ReadsData):
            task.check()
        return cls(cfg, folder, ranks, method, task, source, calibration, calibration.draw() if calibration else None)

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        return scientific_settings(self.cfg)

    def begin(self) -> tuple[RunFolder | None, Mapping[str, Any]]:
        """Writes what is run, and where. Returns the finished run whose checkpoint is taken over, if any, and the provenance."""
        self.folder.write_yaml("config.yaml", OmegaConf.to_container(self.cfg, resolve=True))  # type: ignore[arg-type]
        self.folder.write_json("identity.json", self.identity)
        other = find_quantised(self.folder, self.identity) if self.method else None
        taken = {"checkpoint_of": other.path.name} if other else {}
        texts = _texts(self.calibration, self.task)
        told = {"processes": self.ranks.size, "model": self.source.provenance(), "texts": texts}
        origin = {**provenance(), **taken, **told}
        self.folder.write_json("provenance.json", origin)
        return other, origin

    def check(self) -> Described:
        """What is known of the model without its weights. Raises UserError for samples that it cannot take, and for a budget that
        is out of reach."""
        log.info("loading %s", self.source.path)
        described, drawn = describe(self.source), self.drawn
        check_images(described.config, calibration=self.calibration, evaluation=self.task)
        check_samples(described, [*drawn.examples, *drawn.heldout_examples, *further_examples(drawn)] if drawn else [])
        check_samples(described, self.task.draw() if isinstance(self.task, DrawsSamples) else [])
        if self.method is not None and (empty := empty_model(self.source)) is not None:
            predicted_bits(self.method, list_sites(empty, self.cfg.scope), self.cfg.budget.bits_per_weight)
        return described

    def quantise(self, loaded: Loaded, sites: Sequence[Site], origin: Mapping[str, Any], clock: "Clock") -> QuantReport:
        """The layers quantised, and the tables of that written."""
        method = self.method
        assert method is not None, "there is nothing to quantise at full precision"
        if method.tuning is not None and not method.tunes_blocks:
            size = tuning_bytes(sites) / 1e9
            log.info("tuning=%s will hold all layers decoded, with gradients: %.2f GB", self.cfg.variants.tuning, size)
        bank = statistics_of(self.cfg, method, loaded, sites, self.drawn, self.ranks)
        clock.lap("calibrate")
        log.info("quantising %d layers, %.2f M weights", len(sites), sum(s.num_weights for s in sites) / 1e6)
        code = {name: origin[name] for name in ("version", "commit", "dirty", "packages")}
        journal = Journal(self.folder.partial, code) if method.is_blockwise else None
        report = quantised(self.cfg, method, loaded, sites, bank, self.drawn, journal, self.ranks)
        clock.lap("quantize")
        clock.seconds["quantize"] -= report.tune_seconds
        for name in ("layers", "proxy", "allocation", "channels", "blocks", "tuning"):
            if not (table := getattr(report, name)).empty:
                self.folder.write_table(f"{name}.parquet", table)
        return report

    def save(
        self,
        loaded: Loaded,
        sites: Sequence[Site],
        report: QuantReport | None,
        rounded: Mapping[str, QuantizedWeight],
        clock: "Clock",
    ) -> dict[str, Any]:
        """The checkpoint and its ledger written. Returns what the metrics say of them, as quantization.json has it too."""
        weights, parameters = _moved(report)
        made_of = _made_of(self.identity, self.calibration)
        ledger = save(self.folder.checkpoint, loaded, sites, weights, rounded, parameters, provenance=made_of)
        if report and ledger.scope_bits() != report.stored_bits:
            raise AssertionError(f"{report.stored_bits} bits were predicted, {ledger.scope_bits()} are stored")
        self.folder.write_table("ledger.parquet", ledger.frame())
        made = {
            "rate": _rate(report),
            "flags": list(report.flags) if report else [],
            "sizes": {**ledger.bits(), "bytes/checkpoint": ledger.num_bytes},
            "seconds": {name: clock.seconds.get(name, 0.0) for name in ("calibrate", "quantize")},
        }
        if report and not report.tuning.empty:
            made["sizes"]["tuning/tokens"] = _tokens(report.tuning)
            made["seconds"] |= {"tune": report.tune_seconds} if report.tune_seconds else {}
        self.folder.write_json(QUANTIZATION, made)
        return made

    def load_back(self, loaded: Loaded, device: torch.device) -> PreTrainedModel:
        """The model as the checkpoint has it; where weights are streamed its layers stay packed."""
        packed, dtype = loaded.streamed is not None, getattr(torch, self.source.dtype)
        model = load_checkpoint(
            self.folder.checkpoint, dtype=dtype, device=device, packed=packed, attention=self.source.attention, **self._trusted
        )
        if packed:
            share_equal(model, loaded.model)
            for _, layer in packed_layers(model):
                layer.kernels = False  # the same sums as with memory=resident, and so the same answers where two are nearly tied
        return model

    def evaluate(self, loaded: Loaded, model: PreTrainedModel, digest: str) -> EvalResult:
        """The model asked, beside the one at full precision."""
        shared = {name: self.identity.get(name) for name in ("model", "evaluation", "threads", "device", "tf32", "numerics")}
        with reference(Path(self.cfg.paths.results) / "cache" / "teacher", shared, loaded.model) as asked:
            return self.task(model, asked, load_processor(self.folder.checkpoint, **self._trusted), digest)

    @property
    def _trusted(self) -> dict[str, bool]:
        return {"trust_remote_code": self.source.trust_remote_code}


def _moved(report: QuantReport | None) -> tuple[Mapping[Site, QuantizedWeight], Mapping[str, Tensor]]:
    """What a quantisation has put in place of layers, and of other parameters; nothing at full precision."""
    return (report.weights, report.parameters) if report else ({}, {})


def _made_of(identity: Mapping[str, Any], calibration: Any) -> dict[str, Any]:
    """How the checkpoint was made, for config.json and the model card: what would give the same bytes again.

    The evaluation is no part of it, nor is the machine: provenance.json has that.
    """
    settings = {name: value for name, value in identity.items() if name != "evaluation"}
    return {"mgvq": mgvq.__version__, "settings": settings, "texts": _texts(calibration)}


def _tokens(tuning: pd.DataFrame) -> int:
    """The tokens that a tuning has learned from, all its blocks together."""
    return int(tuning.groupby("site", dropna=False).tokens.max().sum())


def _texts(*parts: Any) -> dict[str, str]:
    """The SHA-256 of the texts that are read, by the group that reads them. Raises UserError where two read the same."""
    texts = {name: digest for part in parts for name, digest in getattr(part, "texts", {}).items()}
    if len(set(texts.values())) < len(texts):
        raise UserError(
            "calibration and evaluation read the same text: a perplexity of it would say how well it is remembered. Give "
            "calibration.path another one than evaluation.path."
        )
    return texts


def _unexplained(broken: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Flags for metrics that are not finite, where the task has not said itself how many samples they lack."""
    return [f"non_finite:{name}" for name in broken if not any(flag.startswith(f"non_finite:{name}:") for flag in flags)]


class Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def _rate(report: QuantReport | None) -> str:
    """The name of the rate of all layers, `mixed` where there are several."""
    if report is None:
        return "full_precision"
    rates = set(report.allocation.rate)
    return rates.pop() if len(rates) == 1 else "mixed"
