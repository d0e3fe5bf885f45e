"""What would make the numbers of a model lie: weights that are missing or not finite."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from mgvq.checks import told_as
from mgvq.errors import UserError
from mgvq.model.hooks import after_forward

_PLAIN = ("F64", "F32", "F16", "BF16")  # as safetensors names them
_SHOWN = 3  # names in a message; the rest are counted


def check_complete(path: object, info: Mapping[str, Any]) -> None:
    """Raises UserError for weights that the files lack, have too many, or have in other shapes than the model's class.

    `info` is what transformers says of the loading. It would draw missing weights at random and leave unexpected ones out.
    """
    problems = [
        f"{len(found)} {what} ({_some(found)})"
        for what, found in (
            ("missing", sorted(info["missing_keys"])),
            ("unexpected", sorted(info["unexpected_keys"])),
            ("of another shape", [f"{name}: {tuple(a)} for {tuple(b)}" for name, a, b in sorted(info["mismatched_keys"])]),
        )
        if found
    ]
    if problems:
        raise UserError(
            f"{path}: its weights are not those of the model that its config.json describes: {'; '.join(problems)}. Missing ones "
            "would be random numbers. Get the files again, or correct config.json; a model that is quantised already cannot be a "
            "source."
        )


def check_stored(path: object, folder: Path) -> None:
    """Raises UserError for weights that are stored in other numbers than plain floating-point ones; reads heads of files alone.

    transformers would take their codes (of 8 bits, say) for the weights themselves, without their scales.
    """
    for file in sorted(folder.glob("*.safetensors")):
        with told_as(f"{file} is damaged", "Get the file again, from where it came."), safe_open(file, "pt") as stored:
            kinds = {name: stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118 (no dictionary)
        if odd := sorted(name for name, kind in kinds.items() if name.endswith(("weight", "bias")) and kind not in _PLAIN):
            raise UserError(
                f"{file}: {len(odd)} tensors are stored as {kinds[odd[0]]} ({_some(odd)}), so that {path} is quantised already, "
                "and no source. Take the model that it was made of, in float32, bfloat16 or float16."
            )


def check_finite(model: PreTrainedModel, path: object, folder: Path, read: Callable[[str], Tensor] | None = None) -> None:
    """Raises UserError, with tensor and file, for weights that are NaN or infinite; `read` gives those on the `meta` device."""
    bad = [n for n, tensor in model.state_dict().items() if not is_finite(read(n) if read and tensor.is_meta else tensor)]
    if not bad:
        return
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            broken = [name for name in stored.keys() if not is_finite(stored.get_tensor(name))]  # noqa: SIM118 (no dictionary)
        if broken:
            raise UserError(
                f"{file}: {len(broken)} tensors hold NaN or infinity ({_some(broken)}). No number that such a model gives can be "
                "trusted: get the file again, or take another model."
            )
    raise UserError(
        f"{path}: {len(bad)} tensors are NaN or infinite in {model.dtype} ({_some(bad)}), and finite in the files: their numbers "
        "are too large for it. Set model.dtype=float32 or bfloat16."
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite; whole numbers always are."""
    # By parts: torch makes copies of what it looks at, and a token embedding is large.
    return not tensor.is_floating_point() or all(bool(torch.isfinite(part).all()) for part in tensor.flatten().split(2**22))


def first_non_finite(model: torch.nn.Module, run: Any) -> str | None:
    """The name of the first module whose output is NaN or infinite while `run()` runs; None where all are finite."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(_: torch.nn.Module, inputs: Any, output: Any) -> None:
            if not found and all(map(is_finite, _tensors(inputs))) and not all(map(is_finite, _tensors(output))):
                found.append(name)

        return hook

    leaves = [name for name, module in model.named_modules() if not any(True for _ in module.children())]
    with after_forward(model, {name: look(name) for name in leaves}):
        run()
    return found[0] if found else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
