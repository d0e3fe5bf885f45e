"""A dry run: what a run would be, counted without weights, and everything that it lacks, all at once."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from mgvq.checks import told_as
from mgvq.errors import UserError
from mgvq.model.load import check_code
from mgvq.model.shape import empty_model, stored_bytes
from mgvq.model.sites import list_sites
from mgvq.model.source import Source
from mgvq.model.streamed import streamed_bytes
from mgvq.protocols import ReadsData
from mgvq.quantization.embeddings import embedding_storage_bits, embeddings
from mgvq.quantization.method import Method
from mgvq.quantization.tuning import tuning_bytes
from mgvq.runs.build import build, check
from mgvq.runs.identity import run_id
from mgvq.runs.method import build_method
from mgvq.types import Site


def report(cfg: DictConfig) -> list[str]:
    """Prints the model, its layers in scope, the sizes, the tasks and what is missing; returns the latter in the order of a run.

    Nothing is downloaded, loaded, locked or written. Raises UserError where not even the model can be told.
    """
    missing: list[str] = []
    method: Method | None = None
    _attempt(missing, lambda: check(cfg))
    if not OmegaConf.missing_keys(cfg):  # what has to be given is said above; nothing can be built of it
        method = _attempt(missing, lambda: build_method(cfg))
        for group in ("calibration", "evaluation"):
            part = _attempt(missing, lambda group=group: build(cfg, group))
            if group == "calibration" and part is not None:
                _attempt(missing, part.draw)
            elif isinstance(part, ReadsData):
                _attempt(missing, part.check)
    source: Source = build(cfg, "model")
    lines = [f"model       {source.name}: {source.path}" + (f" at {source.revision}" if source.on_hub else "")]
    lines += [f"            {flag}" for flag in source.flags()]
    if _attempt(missing, source.identity) is not None and not source.is_made:
        _attempt(missing, lambda: check_code(source))
    lines += _attempt(missing, lambda: _counted(cfg, source, method)) or []
    if tasks := cfg.evaluation.get("tasks"):
        lines.append(f"tasks       {', '.join(tasks)}")
    if not missing:
        lines.append(f"run         {run_id(cfg)}, nothing is missing")
    print("\n".join([*lines, *(f"missing {n}   {text}" for n, text in enumerate(missing, start=1))]))
    return missing


def _attempt(missing: list[str], step: Callable[[], Any]) -> Any:
    """Returns what the step gives; None where it raises UserError, which is noted once."""
    try:
        return step()
    except UserError as error:
        if str(error) not in missing:
            missing.append(str(error))
        return None


def _counted(cfg: DictConfig, source: Source, method: Method | None) -> list[str]:
    with told_as(f"{source.path}: what its config.json describes cannot be made", "Mend the file, or download it again."):
        model = empty_model(source)
    if model is None:
        return ["weights     unknown: model.shape is not given, and config.json is not here"]
    sites = list_sites(model, cfg.scope)
    total = sum(p.numel() for p in model.parameters())
    size = stored_bytes(model)
    width = getattr(torch, source.dtype).itemsize
    if cfg.memory == "streamed":
        held, what, whose = streamed_bytes(model, width), "two blocks and what is in none", "the largest layer"
    else:
        held, what, whose = 2 * total * width, "the model and its quantised twin", "the layers"
    lines = [
        f"weights     {_number(total)}, {_number(size)}B on disk",
        f"in scope    {_by_tower(sites)}",
        f"memory      {_number(held)}B for {what} in {source.dtype}; activations and statistics of {whose} come on top",
    ]
    if method is not None and method.tuning is not None and not method.tunes_blocks:
        lines.append(f"tuning      {_number(tuning_bytes(sites))}B more for decoded layers and gradients; activations on top")
    if (bits := cfg.budget.bits_per_weight) is not None:
        inside = sum(s.num_weights for s in sites)
        stored = inside * bits / 8 + (total - inside) * size / total
        at = f"{bits:g} bits for each weight in scope"
        if cfg.embedding_bits:
            stored += embedding_storage_bits(model, cfg.embedding_bits) / 8
            stored -= sum(w.numel() for w in embeddings(model).values()) * size / total
            at += f", and {cfg.embedding_bits} for those of embedding and head"
        lines.append(f"checkpoint  {_number(stored)}B at {at}")
    return lines


def _by_tower(sites: Sequence[Site]) -> str:
    towers = dict.fromkeys(s.tower for s in sites)
    parts = [[s for s in sites if s.tower == tower] for tower in towers]
    return "; ".join(
        f"{tower} {len(part)} layers, {_number(sum(s.num_weights for s in part))} weights"
        for tower, part in zip(towers, parts, strict=True)
    )


def _number(value: int | float) -> str:
    """Writes a number in thousands, millions or billions."""
    power, letter = next((p, s) for p, s in ((9, "G"), (6, "M"), (3, "k")) if value >= 10**p or p == 3)
    return f"{value / 10**power:.1f} {letter}"
