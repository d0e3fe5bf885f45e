"""Reading a packed checkpoint back into a transformers model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from mgvq.checkpoint.contents import FORMATS, check_layer, open_checkpoint
from mgvq.checkpoint.index import ADVICE
from mgvq.checkpoint.quantizer import METHOD
from mgvq.checks import told_as
from mgvq.model import processor as processors
from mgvq.model.classes import model_class
from mgvq.model.device import find_device
from mgvq.model.files import reading_folder


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    packed: bool = False,
    attention: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
) -> PreTrainedModel:
    """The quantised model, ready to generate; `mgvq.load_processor(path)` gives its processor.

    It is what transformers' `from_pretrained` gives, with all codes decoded once into weights of `dtype`; with `packed` they
    stay packed in memory. `device`: as torch names it, or `auto`, an accelerator where there is one. `attention`:
    transformers' `attn_implementation`. `trust_remote_code`: for a model whose class came with its repository. `verify`: hold
    all files against the digests that the checkpoint carries. Raises UserError, with the file, where `path` is no packed
    checkpoint, is of another version, is damaged or altered, or does not fit its config.
    """
    path, where = Path(path), find_device(device)
    open_checkpoint(path, verify=verify)
    trusted = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    settings: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    with reading_folder(path, path):
        config = AutoConfig.from_pretrained(path, **trusted)
        described = getattr(config, "quantization_config", None) or {}  # version 2 has none
        reading = {"quant_method": METHOD, "dequantize": not packed, "verify": False}
        config.quantization_config = {**described, **reading}
        if packed:
            settings["device_map"] = {"": where}
        model = model_class(config).from_pretrained(path, config=config, dtype=dtype, **settings, **trusted)
    with told_as(f"{path / 'generation_config.json'} cannot be read", ADVICE):
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model.eval().requires_grad_(False).to(where)


def load_processor(path: str | Path, *, trust_remote_code: bool = False, verify: bool = True) -> Any:
    """The processor of a checkpoint (the tokenizer of a model of text alone), set to pad on the left as generation needs it.

    `verify` holds its files, and all others but the weights, against the digests that the checkpoint carries: a chat template
    or a tokenizer that was altered would change answers without a word. Raises UserError as `load` does.
    """
    path = Path(path)
    open_checkpoint(path, verify=verify, weights=False)
    return processors.load_processor(str(path), local_files_only=True, trust_remote_code=trust_remote_code)


@dataclass(frozen=True)
class StoredLayer:
    """A quantised layer, embedding or head as the checkpoint holds it."""

    name: str  # of the module
    format: str  # a key of `FORMATS`
    settings: Mapping[str, Any]  # what the format needs beside the tensors
    tensors: Mapping[str, Tensor]  # by role

    def decode(self) -> Tensor:
        """The weight (out, in), float32."""
        return FORMATS[self.format].load(self.tensors, **self.settings).decode()


def read(path: Path, *, verify: bool = True) -> tuple[list[StoredLayer], dict[str, Tensor]]:
    """The quantised layers and embeddings, and the tensors that are stored as they are, without a model.

    Raises UserError as `load` does.
    """
    contents = open_checkpoint(Path(path), verify=verify)
    stored = dict(contents.tensors())
    layers = []
    for name, layer in contents.index.layers.items():
        tensors = {role: stored[key] for role, key in layer.tensors.items()}
        check_layer(contents, name, tensors)
        layers.append(StoredLayer(name, layer.format, layer.settings, tensors))
    return layers, {name: stored[name] for name in contents.plain()}
