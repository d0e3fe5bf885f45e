"""The name of a run: a hash of every resolved setting that can change its numbers."""

import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mgvq.data.benchmarks import BENCHMARKS
from mgvq.runs.build import build
from mgvq.runs.digests import data_digest, file_digest, listing_digest

# Where a run happens and what is told about it. `seed` counts through the groups that draw with it (`codebook.seed: ${seed}`):
# a method in which nothing is random has one run for all seeds.
NOT_IN_IDENTITY = ("hydra", "paths", "tracker", "device", "seed", "dry")

# Settings that came later, and the value that leaves a run as it was: such a run keeps the name that it had.
LATER = {("calibration", "shown"): "both"}


def scientific_settings(cfg: DictConfig) -> dict[str, Any]:
    """The settings that count, numbers in one spelling (2 is 2.0), a model by what determines its weights.

    Raises UserError where the model's files are missing.
    """
    settings: dict[str, Any] = {
        str(key): OmegaConf.to_container(cfg[key], resolve=True) if OmegaConf.is_config(cfg[key]) else cfg[key]
        for key in cfg
        if key not in NOT_IN_IDENTITY
    }
    source = build(cfg, "model")
    settings["model"] = {"name": source.name, "dtype": source.dtype, "weights": source.identity(), **source.choices()}
    if (data := settings["calibration"].get("path")) is not None:
        settings["calibration"]["path"] = data_digest(data)
    settings["calibration"].pop("images", None)  # a folder of published images: their names in the data tell which they are
    if (rule := settings["allocation"].get("source")) is not None:
        settings["allocation"]["source"] = file_digest(Path(rule))
    if "tasks" in settings["evaluation"]:
        _settle_tasks(settings["evaluation"])
    if settings["codebook"]["_target_"] is None:  # nothing is quantised, in any scope
        for name in ("scope", "sensitivity", "grouping", "compensation"):
            del settings[name]
    for (group, key), value in LATER.items():
        if settings[group].get(key) == value:
            del settings[group][key]
    for stage in ("refit", "transform"):  # stages that came later
        if settings[stage]["_target_"] is None:
            del settings[stage]
    return _canonical(settings)


def _settle_tasks(evaluation: dict[str, Any]) -> None:
    """Of a suite: what belongs to tasks that are not asked goes, and a folder of datasets counts by what is in it."""
    tasks, copies = evaluation["tasks"], evaluation["data"]
    evaluation["max_new_tokens"] = {task: evaluation["max_new_tokens"].get(task) for task in tasks}
    if copies is not None:
        places = {task: Path(copies) / BENCHMARKS[task].dataset for task in tasks if task in BENCHMARKS}
        evaluation["data"] = {task: listing_digest(place) for task, place in places.items()}


def run_id(cfg: DictConfig) -> str:
    """16 hex digits; equal for equal settings, in any process and under any launcher."""
    text = json.dumps(scientific_settings(cfg), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return value
