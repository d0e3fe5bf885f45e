"""One run from a configuration: load, quantise, save, load back, evaluate, write the folder."""

import hashlib
import logging
import math
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from omegaconf import DictConfig, OmegaConf

from mgvq.checkpoint.ledger import Ledger
from mgvq.checkpoint.load import load as load_checkpoint
from mgvq.checkpoint.save import TENSORS, save
from mgvq.model.load import load, load_processor
from mgvq.model.sites import FAMILIES, list_sites
from mgvq.pipeline import quantize
from mgvq.runs.build import build
from mgvq.runs.identity import scientific_settings
from mgvq.runs.provenance import provenance
from mgvq.runs.store import RunFolder
from mgvq.types import Codebook, Rate, Site

SCHEMA_VERSION = 1
log = logging.getLogger(__name__)


def execute(cfg: DictConfig, folder: RunFolder) -> dict[str, Any]:
    """Fill the folder and return its metrics. Bad settings and bad data raise UserError before the model is loaded."""
    parts = {name: build(cfg, name) for name in ("calibration", "curvature", "allocation", "codebook", "evaluation")}
    source = build(cfg, "model")
    drawn = parts["calibration"] and parts["calibration"].draw()
    torch.set_num_threads(cfg.threads)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    torch.use_deterministic_algorithms(True, warn_only=True)
    device = _device(cfg.device)
    with folder:
        if folder.is_done():  # by another process, while this one was starting
            return folder.metrics()
        folder.write_yaml("config.yaml", OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
        folder.write_json("identity.json", scientific_settings(cfg))
        folder.write_json("provenance.json", provenance())
        log.info("loading %s", source.path)
        loaded = load(source, device)
        sites = list_sites(loaded.model, cfg.scope)
        log.info("quantising %d layers, %.2f M weights", len(sites), sum(s.num_weights for s in sites) / 1e6)
        report = quantize(
            loaded.model,
            loaded.processor,
            sites,
            calibration=drawn,
            curvature=parts["curvature"],
            allocation=parts["allocation"],
            codebook=parts["codebook"],
            bits_per_weight=cfg.budget.bits_per_weight,
        )
        towers = FAMILIES[loaded.model.config.model_type]
        ledger = save(folder.checkpoint, loaded, sites, report.weights, towers)
        _check_prediction(parts["codebook"], report.rate, sites, ledger)
        folder.write_table("layers.parquet", report.layers)
        folder.write_table("ledger.parquet", ledger.frame())

        log.info("evaluating %s", folder.checkpoint)
        started = time.perf_counter()
        model = load_checkpoint(folder.checkpoint, dtype=getattr(torch, source.dtype), device=device)
        digest = file_digest(folder.checkpoint / TENSORS)
        result = parts["evaluation"](model, loaded.model, load_processor(str(folder.checkpoint)), digest)
        folder.write_table("samples.parquet", result.samples)
        broken = [name for name, value in result.metrics.items() if not math.isfinite(value)]
        metrics = {
            **result.metrics,
            **dict.fromkeys(broken),
            **ledger.bits(),
            "bytes/checkpoint": ledger.num_bytes,
            "time/calibrate_s": report.seconds["calibrate"],
            "time/quantize_s": report.seconds["quantize"],
            "time/evaluate_s": time.perf_counter() - started,
            "memory/peak_gb": _peak_gb(device),
            "rate": report.rate.name if report.rate else "full_precision",
            "checkpoint_sha256": digest,
            "flags": [*report.flags, *(f"non_finite:{name}" for name in broken)],
            "schema_version": SCHEMA_VERSION,
        }
        folder.write_json("metrics.json", metrics)
    return metrics


def _check_prediction(codebook: Codebook | None, rate: Rate | None, sites: Sequence[Site], ledger: Ledger) -> None:
    """What allocation was told a rate costs is what it came to on disk."""
    if codebook is not None and rate is not None:
        stored, predicted = ledger.scope_bits(), codebook.storage_bits(sites, rate)
        if stored != predicted:
            raise AssertionError(f"{rate.name} was predicted at {predicted} bits and stored in {stored}")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def file_digest(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _peak_gb(device: torch.device) -> float:
    """Of the accelerator where there is one, else of the process, in 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
