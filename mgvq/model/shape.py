"""A model without its weights: what a dry run counts, and how large a download is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import AutoConfig, PreTrainedModel

from mgvq.model.classes import model_class
from mgvq.model.family import Family, declare


@runtime_checkable
class OfKnownShape(Protocol):
    """What is looked at of a source (model/source.py, which cannot be imported here: it asks for sizes)."""

    @property
    def path(self) -> str: ...
    @property
    def shape(self) -> Mapping[str, Any] | None: ...
    @property
    def family(self) -> Mapping[str, Any]: ...
    @property
    def trust_remote_code(self) -> bool: ...


def empty_model(source: OfKnownShape) -> PreTrainedModel | None:
    """The modules of the model on torch's `meta` device, which holds no numbers.

    They are made from config.json where the files are here, otherwise from `source.shape`; None without either.
    """
    config = _config(source)
    if config is None:
        return None
    declare(config, Family(**source.family))
    with torch.device("meta"):
        return model_class(config).from_config(config, trust_remote_code=source.trust_remote_code)


def download_size(source: OfKnownShape) -> int | None:
    """Bytes of the published weights, counted on the empty model in the width in which they are stored; None where unknown.

    A head that shares the token embedding's weights is stored once. What else a repository holds (tokenizer, a second copy of
    the weights in another format) is not counted.
    """
    model = empty_model(source)
    return None if model is None else stored_bytes(model)


def stored_bytes(model: PreTrainedModel) -> int:
    """The bytes of all parameters in the dtype of the model's config."""
    width = model.config.dtype or torch.float32
    assert isinstance(width, torch.dtype)
    return sum(p.numel() for p in model.parameters()) * width.itemsize


def _config(source: OfKnownShape) -> Any:
    if (Path(source.path) / "config.json").is_file():
        return AutoConfig.from_pretrained(source.path, local_files_only=True, trust_remote_code=source.trust_remote_code)
    return AutoConfig.for_model(**source.shape) if source.shape else None
