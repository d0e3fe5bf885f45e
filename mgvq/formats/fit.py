"""Whether stored tensors are what their settings say: looked at before one is decoded, so that damage ends in a sentence.

Every format has a class method `check(tensors, **settings)` beside its `load`, which raises ValueError, or TypeError for settings
that it does not have. On torch's `meta` device, where tensors have no numbers, only their sizes and dtypes are looked at.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mgvq.formats.packing import packed_bytes, unpack


def check_roles(tensors: Mapping[str, Tensor], needed: Collection[str], optional: Collection[str] = ()) -> None:
    """Raises ValueError unless there are all tensors that are `needed`, and no others but those that are `optional`."""
    if missing := sorted(set(needed) - set(tensors)):
        raise ValueError(f"{', '.join(missing)} missing")
    if more := sorted(set(tensors) - set(needed) - set(optional)):
        raise ValueError(f"{', '.join(more)} unknown")


def check_tensor(tensors: Mapping[str, Tensor], role: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """Raises ValueError unless the tensor, where there is one, has this dtype and shape."""
    tensor = tensors.get(role)
    if tensor is not None and (tensor.dtype, tuple(tensor.shape)) != (dtype, tuple(shape)):
        raise ValueError(f"{role} is {_named(tensor.dtype, tensor.shape)} instead of {_named(dtype, shape)}")


def check_packed(tensors: Mapping[str, Tensor], role: str, count: int, width: int, limit: int | None = None) -> None:
    """Raises ValueError unless the tensor holds `count` integers of `width` bits, all of them below `limit`."""
    check_tensor(tensors, role, torch.uint8, (packed_bytes(count, width),))
    packed = tensors.get(role)
    if limit is None or limit >= 2**width or packed is None or packed.is_meta:
        return
    if (largest := int(unpack(packed, width, count).max())) >= limit:
        raise ValueError(f"{role} has the index {largest} where {limit} is the number of entries")


def check_whole(least: int = 1, most: int = 2**31 - 1, **settings: Any) -> None:
    """Raises ValueError for a setting that is no whole number from `least` to `most`; true and false are none."""
    for name, value in settings.items():
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{name} is {value!r} instead of a whole number from {least} to {most}")


def rows_and_columns(shape: Any) -> tuple[int, int]:
    """The two sizes of a layer. Raises ValueError unless `shape` is two whole numbers > 0."""
    if not isinstance(shape, list | tuple) or len(shape) != 2:
        raise ValueError(f"shape is {shape!r} instead of rows and columns")
    check_whole(rows=shape[0], columns=shape[1])
    return shape[0], shape[1]


def check_inner(formats: Mapping[str, Any], tensors: Mapping[str, Tensor], inner: Any, shape: Sequence[int]) -> None:
    """Check the weight that another one is stored as. Raises ValueError where it is of no format of `formats` or other shape."""
    if not isinstance(inner, Mapping) or inner.get("format") not in formats:
        raise ValueError(f"it holds no weight of {', '.join(formats)}")
    settings = {key: value for key, value in inner.items() if key != "format"}
    formats[inner["format"]].check(tensors, **settings)
    if tuple(settings["shape"]) != tuple(shape):
        raise ValueError(f"it holds a weight of {tuple(settings['shape'])} instead of {tuple(shape)}")


def _named(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"
