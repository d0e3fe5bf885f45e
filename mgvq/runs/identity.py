"""The name of a run: a hash of every resolved setting that can change its numbers."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mgvq.runs.build import build

# Where a run happens and what is told about it. `seed` counts through the groups that draw with it (`codebook.seed: ${seed}`):
# a method in which nothing is random has one run for all seeds.
NOT_IN_IDENTITY = ("hydra", "paths", "tracker", "device", "seed")


def scientific_settings(cfg: DictConfig) -> dict[str, Any]:
    """The settings that count, numbers in one spelling (2 is 2.0), a model by what determines its weights.

    Raises UserError where the model's folder is missing.
    """
    settings: dict[str, Any] = {
        str(key): OmegaConf.to_container(cfg[key], resolve=True) if OmegaConf.is_config(cfg[key]) else cfg[key]
        for key in cfg
        if key not in NOT_IN_IDENTITY
    }
    source = build(cfg, "model")
    settings["model"] = {"name": source.name, "dtype": source.dtype, "weights": source.identity()}
    if (rows := settings["calibration"].get("path")) is not None:
        settings["calibration"]["path"] = _data_digest(Path(rows))
    if (rule := settings["allocation"].get("source")) is not None:
        settings["allocation"]["source"] = _file_digest(Path(rule))
    if settings["codebook"]["_target_"] is None:  # nothing is quantised, in any scope
        for name in ("scope", "sensitivity", "grouping", "compensation"):
            del settings[name]
    if settings["refit"]["_target_"] is None:  # a stage that came later: runs without it keep the names that they had
        del settings["refit"]
    return _canonical(settings)


def _file_digest(file: Path) -> str:
    """SHA-256 of a file; a missing one is reported later."""
    return hashlib.sha256(file.read_bytes() if file.is_file() else b"").hexdigest()


def _data_digest(rows: Path) -> str:
    """SHA-256 over a calibration file and the images that its rows name; a missing one is reported later."""
    content = rows.read_bytes() if rows.is_file() else b""
    digest = hashlib.sha256(content)
    for line in content.splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError, OSError):
            digest.update((rows.parent / json.loads(line)["image"]).read_bytes())
    return digest.hexdigest()


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
