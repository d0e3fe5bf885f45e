"""Values of a run's own classes as bytes and back, without pickle: json tells the structure, safetensors has the tensors."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from mgvq.checkpoint.contents import DTYPES

_STRUCTURE = "structure"  # the one key of the metadata


def to_bytes(value: Any) -> bytes:
    """Texts, numbers, lists, tuples, mappings, tensors and dataclasses, nested in any way.

    A tensor that stands in several places is written once and is one object again. What a dataclass holds beside its fields is
    not written. Raises TypeError for a value of another type.
    """
    tensors: dict[int, Tensor] = {}  # by id: they are all held by `value`
    structure = json.dumps(_told(value, tensors))
    stored = {str(number): tensor.detach().cpu().clone().contiguous() for number, tensor in enumerate(tensors.values())}
    return safetensors.torch.save(stored or {"": torch.empty(0)}, {_STRUCTURE: structure})


def from_bytes(content: bytes | memoryview) -> Any:
    """What `to_bytes` was given, its tensors in the memory of `content` where that can be written.

    Raises ValueError for bytes that are not its own, or name a class that is no dataclass here.
    """
    try:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(bytes(content[8 : 8 + size]))
        structure = json.loads(header.pop("__metadata__")[_STRUCTURE])
        data = memoryview(content)[8 + size :]
        return _made(structure, {name: _tensor(told, data) for name, told in header.items()})
    except (KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise ValueError(f"not what was written: {error}") from error


def _tensor(told: Mapping[str, Any], data: memoryview) -> Tensor:
    """A tensor as the header tells it: the library's own reading makes two copies, of what can be a tenth of a gigabyte."""
    first, stop = told["data_offsets"]
    dtype, own = DTYPES[told["dtype"]], data[first:stop]
    if own.nbytes != stop - first:
        raise ValueError("not what was written: it is cut off")
    flat = torch.frombuffer(bytearray(own) if own.readonly else own, dtype=dtype) if own.nbytes else torch.empty(0, dtype=dtype)
    return flat.view(told["shape"])


def _told(value: Any, tensors: dict[int, Tensor]) -> Any:
    """The structure: what json has no word for is a list that begins with one."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Tensor):
        tensors.setdefault(id(value), value)
        return ["tensor", list(tensors).index(id(value))]
    if isinstance(value, list | tuple):
        return [type(value).__name__, *(_told(one, tensors) for one in value)]
    if isinstance(value, Mapping):
        return ["dict", *([_told(key, tensors), _told(own, tensors)] for key, own in value.items())]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind, fields = type(value), dataclasses.fields(value)
        return ["class", kind.__module__, kind.__qualname__, {f.name: _told(getattr(value, f.name), tensors) for f in fields}]
    raise TypeError(f"{type(value).__name__} is nothing that can be kept")


def _made(told: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(told, list):
        return told
    word, *rest = told
    if word == "tensor":
        return tensors[str(rest[0])]
    if word == "dict":
        return {_made(key, tensors): _made(own, tensors) for key, own in rest}
    if word != "class":
        return {"list": list, "tuple": tuple}[word](_made(one, tensors) for one in rest)
    module, name, fields = rest
    # Modules of others are there if they are in use; a file has none imported.
    kind: Any = getattr(import_module(module) if module.startswith("mgvq.") else sys.modules[module], name)
    if not dataclasses.is_dataclass(kind):
        raise ValueError(f"{module}.{name} is no dataclass")
    made = object.__new__(kind)  # type: ignore[arg-type]  (without its checks, which its values passed when they were made)
    for field, own in fields.items():
        object.__setattr__(made, field, _made(own, tensors))
    return made
