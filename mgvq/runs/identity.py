"""The name of a run: a hash of every resolved setting that can change its numbers."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mgvq.calibration.rows import image_names
from mgvq.runs.build import build

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
        settings["calibration"]["path"] = _data_digest(data)
    settings["calibration"].pop("images", None)  # a folder of published images: their names in the data tell which they are
    if (rule := settings["allocation"].get("source")) is not None:
        settings["allocation"]["source"] = _file_digest(Path(rule))
    if settings["codebook"]["_target_"] is None:  # nothing is quantised, in any scope
        for name in ("scope", "sensitivity", "grouping", "compensation"):
            del settings[name]
    for (group, key), value in LATER.items():
        if settings[group].get(key) == value:
            del settings[group][key]
    if settings["refit"]["_target_"] is None:  # a stage that came later
        del settings["refit"]
    return _canonical(settings)


def _file_digest(file: Path) -> str:
    """SHA-256 of a file; a missing one is reported later."""
    return hashlib.sha256(_bytes(file)).hexdigest()


def _bytes(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""


def _data_digest(path: str) -> str:
    """SHA-256 over a folder's files, or a file and the images that its JSON lines name. Anything else, as a hub name, stays."""
    data, digest = Path(path), hashlib.sha256()
    if data.is_dir():
        for file in sorted(f for f in data.rglob("*") if f.is_file()):
            digest.update(f"{file.relative_to(data).as_posix()} {_file_digest(file)}\n".encode())
    elif data.is_file():
        content = data.read_bytes()
        digest.update(content)
        for line in content.splitlines() if data.suffix != ".json" else ():
            with contextlib.suppress(ValueError):  # reported later, as missing images are
                for name in image_names(json.loads(line)):
                    digest.update(_bytes(data.parent / name))
    else:
        return path
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
