"""Hooks on a model's modules that are gone when the `with` block ends, whatever happens in it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

AfterForward = Callable[[nn.Module, tuple[Any, ...], Any], Any]
BeforeForward = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


@contextmanager
def after_forward(model: nn.Module, hooks: Mapping[str, AfterForward]) -> Iterator[None]:
    """Call `hook(module, args, output)` after the forward pass of the submodule of each name, the model's own for "".

    What it returns, but None, takes the place of the output.
    """
    with ExitStack() as stack:
        for name, hook in hooks.items():
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield


@contextmanager
def before_forward(model: nn.Module, hooks: Mapping[str, BeforeForward]) -> Iterator[None]:
    """Call `hook(module, args, kwargs)` before the forward pass of the submodule of each name."""
    with ExitStack() as stack:
        for name, hook in hooks.items():
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def outputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Filled by forward passes: the latest output of the submodule of each name that was called, the first of a tuple."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> AfterForward:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            seen[name] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    with after_forward(model, {name: keep(name) for name in names}):
        yield seen
