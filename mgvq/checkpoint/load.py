"""Reading a packed checkpoint back into a transformers model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from mgvq.checkpoint.linear import PackedLinear
from mgvq.checkpoint.save import INDEX, TENSORS, VERSION
from mgvq.errors import UserError
from mgvq.formats.rotated import INNER_FORMATS, RotatedWeight
from mgvq.model.load import model_class

FORMATS = {**INNER_FORMATS, RotatedWeight.format: RotatedWeight}


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    packed: bool = False,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The quantised model, ready to generate; `AutoProcessor.from_pretrained(path)` gives its processor.

    The codes are decoded once, into weights of `dtype`; with `packed` they stay packed in memory and every call decodes them.
    `attention`: transformers' `attn_implementation`. `trust_remote_code`: for a model whose class came with its repository.
    Raises UserError where `path` is no packed checkpoint, is of another version, or lacks tensors.
    """
    path = Path(path)
    layers, tensors = read(path)
    trusted = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(path, local_files_only=True, **trusted)
    settings = {"attn_implementation": attention} if attention else {}
    model = model_class(config).from_config(config, dtype=dtype, **settings, **trusted)
    state = {f"{layer.name}.weight": layer.decode() for layer in layers}
    result = model.load_state_dict({**tensors, **state}, strict=False)
    model.tie_weights()
    tied = set(model.all_tied_weights_keys)
    missing = [k for k in result.missing_keys if k not in tied]
    if missing or result.unexpected_keys:
        raise UserError(
            f"{path / TENSORS} does not fit its config.json: missing {missing[:3]}, unexpected {result.unexpected_keys[:3]}."
        )
    if packed:
        for layer in layers:
            bias = model.get_submodule(layer.name).bias
            model.set_submodule(layer.name, PackedLinear(FORMATS[layer.format], layer.settings, layer.tensors, bias))
    model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model.eval().requires_grad_(False).to(device)


@dataclass(frozen=True)
class StoredLayer:
    """A quantised layer as the checkpoint holds it."""

    name: str
    format: str
    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def decode(self) -> Tensor:
        """The weight (out, in), float32."""
        return FORMATS[self.format].load(self.tensors, **self.settings).decode()


def read(path: Path) -> tuple[list[StoredLayer], dict[str, Tensor]]:
    """The quantised layers, and the tensors that are stored as they are."""
    if not (path / INDEX).is_file() or not (path / TENSORS).is_file():
        raise UserError(f"{path} is no mgvq checkpoint: it needs {INDEX} and {TENSORS}; a run keeps it in RUN/checkpoint.")
    index = json.loads((path / INDEX).read_text())
    if index["version"] != VERSION:
        raise UserError(f"{path / INDEX} has version {index['version']}; this mgvq reads version {VERSION}.")
    stored = load_file(path / TENSORS)
    layers = []
    used = set()
    for name, entry in index["layers"].items():
        roles = entry.pop("tensors")
        if lacking := set(roles.values()) - set(stored):
            raise UserError(f"{path / TENSORS} lacks {sorted(lacking)} of layer {name}; the checkpoint is damaged.")
        used |= set(roles.values())
        layers.append(StoredLayer(name, entry.pop("format"), entry, {role: stored[key] for role, key in roles.items()}))
    return layers, {name: t for name, t in stored.items() if name not in used}
