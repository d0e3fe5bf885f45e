"""What the cases are made of: copies of the shipped models that something was done to, and runs in this process."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mgvq.model.source import SHIPPED, Source
from mgvq.runs.compose import composer
from mgvq.runs.execute import execute
from mgvq.runs.store import RunFolder

CPU = torch.device("cpu")
BLOCK = "model.language_model.layers.1"  # as the model has it; its file says `language_model.model` for the first two


def copy(folder: Path, family: str = "tiny_internvl") -> Path:
    """A copy of a shipped model's folder."""
    return Path(shutil.copytree(SHIPPED / family, folder))


def source(folder: Path, **settings: Any) -> Source:
    return Source(**{"name": "m", "path": str(folder), "revision": None, "dtype": "float32", **settings})


def edit_json(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change the object in a json file in place."""
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the weights of a model's folder in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def run(results: Path, model: Path | str, *overrides: str) -> RunFolder:
    """A finished run in this process: a few questions, forced."""
    chosen = [f"model={model}"] if isinstance(model, str) else ["model=local", f"model.path={model}"]
    few = ["evaluation.num_questions=26", "evaluation.answers=forced"]
    with composer() as compose:
        cfg = compose(*chosen, *few, *overrides)
    cfg.paths.results = str(results)
    done = RunFolder(results / "run")
    execute(cfg, done)
    return done
