"""Reading a packed checkpoint back into a transformers model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from mgvq.checkpoint.digests import check_digests
from mgvq.checkpoint.linear import PackedLinear
from mgvq.checkpoint.save import INDEX, TENSORS, VERSION
from mgvq.checks import told_as
from mgvq.errors import UserError
from mgvq.formats.outliers import REST_FORMATS, OutlierWeight
from mgvq.model import processor as processors
from mgvq.model.classes import model_class
from mgvq.model.device import find_device
from mgvq.model.files import read_json, reading_folder
from mgvq.model.health import is_finite

FORMATS = {**REST_FORMATS, OutlierWeight.format: OutlierWeight}
_READABLE = (2, VERSION)  # 2 has no digests
_DAMAGED = "The checkpoint is damaged: take the run's own copy, or make it again."


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

    The codes are decoded once, into weights of `dtype`; with `packed` they stay packed in memory (`mgvq.kernels.linear`).
    `device`: as torch names it, or `auto`, an accelerator where there is one. `attention`: transformers' `attn_implementation`.
    `trust_remote_code`: for a model whose class came with its repository. `verify`: hold all files against the digests that the
    checkpoint carries. Raises UserError, with the file, where `path` is no packed checkpoint, is of another version, is damaged
    or altered, or does not fit its config.
    """
    path = Path(path)
    layers, tensors = read(path, verify=verify)
    trusted = {"trust_remote_code": trust_remote_code}
    settings = {"attn_implementation": attention} if attention else {}
    with reading_folder(path, path):
        config = AutoConfig.from_pretrained(path, local_files_only=True, **trusted)
        model: PreTrainedModel = model_class(config).from_config(config, dtype=dtype, **settings, **trusted)
    _keep_wide(model, dtype)
    state = {**tensors, **{f"{layer.name}.weight": _decoded(path, layer) for layer in layers}}
    _fill(path, model, state)
    if packed:
        for layer in layers:
            module: Any = model.get_submodule(layer.name)
            if not isinstance(module, torch.nn.Linear):  # an embedding is looked up, row by row
                continue
            linear = PackedLinear(FORMATS[layer.format], layer.settings, layer.tensors, module.bias)
            model.set_submodule(layer.name, linear)
    with told_as(f"{path / 'generation_config.json'} cannot be read", _DAMAGED):
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model.eval().requires_grad_(False).to(find_device(device))  # type: ignore[arg-type]


def load_processor(path: str | Path, *, trust_remote_code: bool = False, verify: bool = True) -> Any:
    """The processor of a checkpoint (the tokenizer of a model of text alone), set to pad on the left as generation needs it.

    `verify` holds its files, and all others but the weights, against the digests that the checkpoint carries: a chat template
    or a tokenizer that was altered would change answers without a word. Raises UserError as `load` does.
    """
    path = Path(path)
    _read_index(path, verify=verify, leave_out=(TENSORS,))
    return processors.load_processor(str(path), local_files_only=True, trust_remote_code=trust_remote_code)


def _fill(path: Path, model: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Put the weights into the model. A head that is stored beside the embedding is one of its own, whatever the config says.

    Raises UserError for weights that are missing, unexpected, of another shape, NaN or infinite.
    """
    if bad := sorted(name for name, tensor in state.items() if not is_finite(tensor)):
        raise UserError(f"{path / TENSORS}: {len(bad)} tensors are NaN or infinite, the first {bad[0]}. {_DAMAGED}")
    for target, source in model.all_tied_weights_keys.items():
        if target in state and source in state:
            parent, _, name = target.rpartition(".")
            setattr(model.get_submodule(parent), name, torch.nn.Parameter(model.get_parameter(target).detach().clone()))
    with told_as(f"{path / TENSORS} does not fit its config.json", _DAMAGED):
        result = model.load_state_dict(state, strict=False)
    missing = set(result.missing_keys)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)  # as transformers does when it loads the source
    if missing or result.unexpected_keys:
        raise UserError(
            f"{path / TENSORS} does not fit its config.json: missing {sorted(missing)[:3]}, "
            f"unexpected {result.unexpected_keys[:3]}."
        )


def _keep_wide(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Some classes keep some modules in float32 when they are loaded in 16 bits: so does a checkpoint of theirs."""
    for name, width in model._get_dtype_plan(dtype).items():
        for key, parameter in model.named_parameters():
            if re.search(rf"(^|\.){re.escape(name)}(\.|$)", key):
                parameter.data = parameter.data.to(width)


def _decoded(path: Path, layer: "StoredLayer") -> Tensor:
    with told_as(f"{path}: layer {layer.name} cannot be decoded from {INDEX} and {TENSORS}", _DAMAGED):
        return layer.decode()


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
    """The quantised layers and embeddings, and the tensors that are stored as they are. Raises UserError as `load` does."""
    index = _read_index(path, verify=verify)
    with told_as(f"{path / TENSORS} cannot be read", _DAMAGED):
        stored = load_file(path / TENSORS)
    layers = []
    used: set[str] = set()
    with told_as(f"{path / INDEX} does not describe layers", _DAMAGED):
        for name, entry in index["layers"].items():
            settings = dict(entry)
            kind, roles = str(settings.pop("format")), dict(settings.pop("tensors"))
            if kind not in FORMATS:
                raise UserError(f"{path / INDEX}: layer {name} has the format {kind!r}; this mgvq reads {', '.join(FORMATS)}.")
            if lacking := sorted(set(roles.values()) - set(stored)):
                raise UserError(f"{path / TENSORS} lacks {lacking} of layer {name}; the checkpoint is damaged.")
            used |= set(roles.values())
            layers.append(StoredLayer(name, kind, settings, {role: stored[key] for role, key in roles.items()}))
    return layers, {name: t for name, t in stored.items() if name not in used}


def _read_index(path: Path, *, verify: bool, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    if not (path / INDEX).is_file() or not (path / TENSORS).is_file():
        raise UserError(f"{path} is no mgvq checkpoint: it needs {INDEX} and {TENSORS}; a run keeps it in RUN/checkpoint.")
    index = read_json(path / INDEX)
    if index.get("version") not in _READABLE:
        raise UserError(
            f"{path / INDEX} has version {index.get('version')}; this mgvq reads versions {' and '.join(map(str, _READABLE))}."
        )
    if verify and index["version"] >= VERSION:
        check_digests(path, leave_out=leave_out)
    return index
