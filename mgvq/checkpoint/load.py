"""Reading a packed checkpoint back into a transformers model."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedModel

from mgvq.checkpoint.linear import PackedLinear
from mgvq.checkpoint.save import INDEX, TENSORS, VERSION
from mgvq.errors import UserError
from mgvq.formats.scalar import ScalarWeight
from mgvq.formats.vector import VectorWeight
from mgvq.types import QuantizedWeight

FORMATS = {f.format: f for f in (ScalarWeight, VectorWeight)}


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    packed: bool = False,
) -> PreTrainedModel:
    """The quantised model, ready to generate; `AutoProcessor.from_pretrained(path)` gives its processor.

    The codes are decoded once, into weights of `dtype`; with `packed` they stay packed in memory and every call decodes them.
    Raises UserError where `path` is no packed checkpoint, is of another version, or lacks tensors.
    """
    path = Path(path)
    weights, tensors = read(path)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path, local_files_only=True), dtype=dtype)
    state = {f"{name}.weight": weight.decode() for name, weight in weights.items()}
    result = model.load_state_dict({**tensors, **state}, strict=False)
    model.tie_weights()
    tied = set(model.all_tied_weights_keys)
    missing = [k for k in result.missing_keys if k not in tied]
    if missing or result.unexpected_keys:
        raise UserError(
            f"{path / TENSORS} does not fit its config.json: missing {missing[:3]}, unexpected {result.unexpected_keys[:3]}."
        )
    if packed:
        for name, weight in weights.items():
            linear = model.get_submodule(name)
            model.set_submodule(name, PackedLinear(weight, linear.bias, dtype))
    model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model.eval().requires_grad_(False).to(device)


def read(path: Path) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    """The quantised layers by name, and the tensors that are stored as they are."""
    if not (path / INDEX).is_file() or not (path / TENSORS).is_file():
        raise UserError(f"{path} is no mgvq checkpoint: it needs {INDEX} and {TENSORS}; a run keeps it in RUN/checkpoint.")
    index = json.loads((path / INDEX).read_text())
    if index["version"] != VERSION:
        raise UserError(f"{path / INDEX} has version {index['version']}; this mgvq reads version {VERSION}.")
    tensors = load_file(path / TENSORS)
    weights: dict[str, QuantizedWeight] = {}
    used = set()
    for name, layer in index["layers"].items():
        roles = layer.pop("tensors")
        if lacking := set(roles.values()) - set(tensors):
            raise UserError(f"{path / TENSORS} lacks {sorted(lacking)} of layer {name}; the checkpoint is damaged.")
        used |= set(roles.values())
        format_class = FORMATS[layer.pop("format")]
        weights[name] = format_class.load({role: tensors[key] for role, key in roles.items()}, **layer)
    return weights, {name: t for name, t in tensors.items() if name not in used}
