"""The check inside every run that the checkpoint is the model that was quantised: a few logits of both."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from mgvq.errors import UserError
from mgvq.model.answers import answer_logits
from mgvq.model.hooks import after_forward
from mgvq.model.load import Loaded
from mgvq.model.probe import probe
from mgvq.protocols import QuantizedWeight
from mgvq.types import Site

TOLERANCE = 1e-3  # of the logits' spread: a device may round a decoded weight otherwise than another; full precision is exact


@torch.inference_mode()
def check_same_model(
    loaded: Loaded,
    weights: Mapping[Site, QuantizedWeight],
    back: PreTrainedModel,
    path: object,
    embeddings: Mapping[str, QuantizedWeight] | None = None,
    parameters: Mapping[str, Tensor] | None = None,
) -> None:
    """Raises UserError where the model that was read back from `path` says other things than `loaded` with `weights`,
    `embeddings` (by the names of their modules) and `parameters` (by their own) in place.

    Without any the logits have to be equal to the bit. One layer is decoded at a time: no second model is needed.
    """
    batch = probe(loaded.model, loaded.processor)
    exchanged = {f"{name}.weight": weight.decode for name, weight in (embeddings or {}).items()}
    exchanged |= {name: tensor.clone for name, tensor in (parameters or {}).items()}
    with _in_place(loaded.model, weights), _exchanged(loaded.model, exchanged):
        expected = answer_logits(loaded.model, batch)
    check_same_logits(expected, answer_logits(back, batch), exact=not (weights or exchanged), path=path)


def check_same_logits(
    expected: Float[Tensor, "answers vocabulary"], found: Float[Tensor, "answers vocabulary"], *, exact: bool, path: object
) -> None:
    """Raises UserError where `found` is not `expected`: to the bit where `exact`, else within `TOLERANCE`. NaN equals nothing."""
    room = 0.0 if exact else TOLERANCE * float(expected.std())
    difference = float((expected - found.to(expected)).abs().max())
    if not difference <= room:
        raise UserError(
            f"{path} is not the model that was quantised: the logits of a few tokens differ by {difference:.3g} (their spread is "
            f"{float(expected.std()):.3g}, and {room:.3g} would be rounding). Something of the model (a head that is tied in "
            "one of the two, a buffer, a dtype) is not in the checkpoint, and its numbers would be wrong: report the class."
        )


@contextmanager
def _in_place(model: nn.Module, weights: Mapping[Site, QuantizedWeight]) -> Iterator[None]:
    """Inside, the layers of `weights` compute with them, decoded anew at each call; the model itself stays as it is."""

    def use(weight: QuantizedWeight) -> Any:
        def hook(module: Any, inputs: tuple[Any, ...], _: Any) -> Tensor:
            (x,) = inputs
            decoded = weight.decode().to(x.device, module.weight.dtype)
            return nn.functional.linear(x, decoded, module.bias)  # a hook's result replaces the layer's own

        return hook

    with after_forward(model, {site.name: use(weight) for site, weight in weights.items()}):
        yield


@contextmanager
def _exchanged(model: nn.Module, values: Mapping[str, Callable[[], Tensor]]) -> Iterator[None]:
    """Inside, parameters are what these functions give, also where a head is tied to them."""
    parameters = {name: model.get_parameter(name) for name in values}
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name]().to(parameter.data)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]
