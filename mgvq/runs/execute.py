"""One run from a configuration: load, quantise, save, load back, evaluate, write the folder."""

import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from omegaconf import DictConfig, OmegaConf

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
from mgvq.model.load import describe, load
from mgvq.model.shape import empty_model
from mgvq.model.sites import left_out_flags, list_sites
from mgvq.model.streamed import share_equal
from mgvq.progress import peak_gb
from mgvq.protocols import DrawsSamples, ReadsData
from mgvq.quantization.embeddings import round_embeddings
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

log = logging.getLogger(__name__)


def execute(cfg: DictConfig, folder: RunFolder, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Fills the folder and returns its metrics. Bad settings and bad data raise UserError before the model is loaded.

    Of several processes (`ranks`) this is the first, which alone writes and evaluates, while `quantise.assist` is the others.
    """
    method = build_method(cfg)
    task, source, calibration = (build(cfg, group) for group in ("evaluation", "model", "calibration"))
    if isinstance(task, ReadsData):
        task.check()
    drawn = calibration.draw() if calibration else None
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    device = set_up(cfg, ranks)
    with folder:
        if folder.is_done():  # by another process, while this one was starting
            ranks.first(WHETHER, lambda: False)
            folder.discard_partial()
            return folder.metrics()
        folder.write_yaml("config.yaml", OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
        identity = scientific_settings(cfg)
        folder.write_json("identity.json", identity)
        other = find_quantised(folder, identity) if method else None
        taken = {"checkpoint_of": other.path.name} if other else {}
        told = {"processes": ranks.size, "model": source.provenance(), "texts": _texts(calibration, task)}
        origin = {**provenance(), **taken, **told}
        folder.write_json("provenance.json", origin)
        log.info("loading %s", source.path)
        described = describe(source)
        check_images(described.config, calibration=calibration, evaluation=task)
        check_samples(described, [*drawn.examples, *drawn.heldout_examples, *further_examples(drawn)] if drawn else [])
        check_samples(described, task.draw() if isinstance(task, DrawsSamples) else [])
        if method is not None and (empty := empty_model(source)) is not None:
            predicted_bits(method, list_sites(empty, cfg.scope), cfg.budget.bits_per_weight)  # refuses one that is out of reach
        ranks.first(WHETHER, lambda: method is not None and other is None)
        loaded = load(source, device, described, streamed=cfg.memory == "streamed")
        sites = list_sites(loaded.model, cfg.scope)
        flags = left_out_flags(loaded.model, sites)
        clock = Clock()
        weights, rounded, parameters, report, made = {}, {}, {}, None, None
        if other is not None:
            log.info("taking over the checkpoint of %s, which differs in the evaluation alone", other.path)
            made = take_over(other, folder)
        elif method is not None:
            if method.tuning is not None and not method.tunes_blocks:
                size = tuning_bytes(sites) / 1e9
                log.info("tuning=%s will hold all layers decoded, with gradients: %.2f GB", cfg.variants.tuning, size)
            bank = statistics_of(cfg, method, loaded, sites, drawn, ranks)
            clock.lap("calibrate")
            log.info("quantising %d layers, %.2f M weights", len(sites), sum(s.num_weights for s in sites) / 1e6)
            code = {name: origin[name] for name in ("version", "commit", "dirty", "packages")}
            journal = Journal(folder.partial, code) if method.is_blockwise else None
            report = quantised(cfg, method, loaded, sites, bank, drawn, journal, ranks)
            clock.lap("quantize")
            clock.seconds["quantize"] -= report.tune_seconds
            tables = {
                "layers": report.layers,
                "proxy": report.proxy,
                "allocation": report.allocation,
                "channels": report.channels,
                "blocks": report.blocks,
                "tuning": report.tuning,
            }
            for name, table in tables.items():
                if not table.empty:
                    folder.write_table(f"{name}.parquet", table)
            weights, parameters = report.weights, report.parameters
        give_back()
        if made is None:
            rounded = round_embeddings(loaded.model, cfg.embedding_bits) if cfg.embedding_bits else {}
            made_of = _made_of(identity, calibration)
            ledger = save(folder.checkpoint, loaded, sites, weights, rounded, parameters, provenance=made_of)
            if report and ledger.scope_bits() != report.stored_bits:
                raise AssertionError(f"{report.stored_bits} bits were predicted, {ledger.scope_bits()} are stored")
            folder.write_table("ledger.parquet", ledger.frame())
            made = {
                "rate": _rate(report),
                "flags": list(report.flags) if report else [],
                "sizes": {**ledger.bits(), "bytes/checkpoint": ledger.num_bytes},
                "seconds": {name: clock.seconds.get(name, 0.0) for name in ("calibrate", "quantize")},
            }
            if report and not report.tuning.empty:
                made["sizes"]["tuning/tokens"] = _tokens(report.tuning)
                made["seconds"] |= {"tune": report.tune_seconds} if report.tune_seconds else {}
            folder.write_json(QUANTIZATION, made)

        log.info("evaluating %s", folder.checkpoint)
        clock.lap("save")
        trusted = {"trust_remote_code": source.trust_remote_code}
        dtype = getattr(torch, source.dtype)
        packed = loaded.streamed is not None
        model = load_checkpoint(
            folder.checkpoint, dtype=dtype, device=device, packed=packed, attention=source.attention, **trusted
        )
        if packed:
            share_equal(model, loaded.model)
            for _, layer in packed_layers(model):
                layer.kernels = False  # the same sums as with memory=resident, and so the same answers where two are nearly tied
        if other is None:  # else the run that made the checkpoint has compared them, and its digests are as they were
            check_same_model(loaded, weights, model, folder.checkpoint, rounded, parameters)
        digest = file_digest(folder.checkpoint / FIRST_SHARD)
        give_back()
        shared = {name: identity.get(name) for name in ("model", "evaluation", "threads", "device", "tf32", "numerics")}
        with reference(Path(cfg.paths.results) / "cache" / "teacher", shared, loaded.model) as asked:
            result = task(model, asked, load_processor(folder.checkpoint, **trusted), digest)
        clock.lap("evaluate")
        folder.write_table("samples.parquet", result.samples)
        write_card(folder.checkpoint, loaded.licence, scores(result, cfg.evaluation))
        write_digests(folder.checkpoint)
        broken = [name for name, value in result.metrics.items() if not math.isfinite(value)]
        metrics = {
            **result.metrics,
            **dict.fromkeys(broken),
            **made["sizes"],
            **{f"time/{name}_s": seconds for name, seconds in {**made["seconds"], "evaluate": clock.seconds["evaluate"]}.items()},
            "memory/peak_gb": peak_gb(),
            "rate": made["rate"],
            "checkpoint_sha256": digest,
            "flags": [
                *source.flags(),
                *flags,
                *made["flags"],
                *result.flags,
                *_unexplained(broken, result.flags),
            ],
            "schema_version": SCHEMA_VERSION,
        }
        folder.write_json("metrics.json", metrics)
    folder.discard_partial()
    return metrics


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
