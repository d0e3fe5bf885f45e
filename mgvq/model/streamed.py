"""A model whose blocks are read from its files when they run: at most two of them are in memory at a time.

The parameters of all other blocks have no numbers (`Absent`): whoever uses one outside of its block's forward pass gets an
error, and no wrong result.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from accelerate.hooks import remove_hook_from_module
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mgvq.model.lazy import Lazy
from mgvq.model.sites import linear
from mgvq.model.towers import block_numbers, find_towers
from mgvq.protocols import QuantizedWeight
from mgvq.types import Site

# A pass behind the last settled block computes that block's output and stops in the next one: both have to be there, or they
# would be read in turn for every batch.
_MOST = 2


class Absent(nn.Parameter):
    """A parameter on the `meta` device that tells its shape and dtype, and raises RuntimeError where it is computed with.

    torch alone does not always: the product of a tensor on the CPU with a matrix on `meta` can be whatever was in memory.
    """

    _TOLD: ClassVar = {
        "__get__",
        "detach",
        "dim",
        "element_size",
        "is_floating_point",
        "nelement",
        "numel",
        "requires_grad_",
        "size",
    }

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ not in cls._TOLD:
            raise RuntimeError(f"{func.__name__} of a parameter whose block is not in memory (memory=streamed)")
        found = super().__torch_function__(func, types, args, kwargs or {})
        return cls(found, requires_grad=False) if type(found) is Tensor else found


@dataclass(frozen=True)
class _Place:
    """Where a parameter is stored."""

    file: str
    name: str  # in the file
    dtype: torch.dtype  # in the model


class StreamedWeights:
    """The weights of a model whose blocks are on disk (`Weights`), and what brings a block into memory for its forward pass.

    A layer that was rounded is kept as its codes, a byte or two each, and decoded whenever its block is read.
    """

    streamed = True

    def __init__(self, model: PreTrainedModel, blocks: Sequence[str], places: Mapping[str, _Place]) -> None:
        """`blocks`: the names of their modules. `places`: of all their parameters."""
        self._model, self._places = model, places
        self._files: dict[str, Any] = {}  # open ones, by path
        self._rounded: dict[str, QuantizedWeight] = {}  # by the name of the parameter
        self._held: OrderedDict[str, _Held] = OrderedDict()  # the blocks in memory, by name, the latest last
        self._whole: set[str] = set()  # blocks that keep their own graph
        self.blocks = tuple(blocks)
        for block in blocks:
            module = model.get_submodule(block)
            for name, parameter in list(module.named_parameters(prefix=block)):
                _put(model, name, Absent(parameter.data, requires_grad=False))
            module.forward = _Reading(self, block, module)

    def read(self, name: str) -> Tensor:
        """A copy of a block's parameter as the model's files have it, in the dtype that it has in the model."""
        place = self._places[name]
        if place.file not in self._files:
            self._files[place.file] = safe_open(place.file, "pt")
        # A copy in any case: the file is mapped, and what is written into its pages would be read from them again.
        return self._files[place.file].get_tensor(place.name).to(place.dtype, copy=True)

    def originals(self, sites: Sequence[Site]) -> Mapping[Site, Tensor]:
        """The weights of full precision, each read when it is asked for; on the model's device.

        Those outside of the blocks stay in memory, where rounding overwrites them: of these there are copies as they are now.
        """
        outside = {site: linear(self._model, site).weight.detach().clone() for site in sites if not self.block_of(site.name)}
        return Lazy(sites, lambda site: outside[site] if site in outside else self._original(site))

    def install(self, decoded: Mapping[Site, Tensor], stored: Mapping[Site, QuantizedWeight]) -> None:
        for site, values in decoded.items():
            self._rounded[f"{site.name}.weight"] = stored[site]
            if self.block_of(site.name) in self._held or not self.block_of(site.name):
                linear(self._model, site).weight.data.copy_(values)

    @contextmanager
    def unchanged(self, sites: Sequence[Site]) -> Iterator[Mapping[Site, Tensor]]:
        before = {name: self._rounded.get(name) for name in (f"{site.name}.weight" for site in sites)}
        outside = {site: linear(self._model, site).weight.detach().clone() for site in sites if not self.block_of(site.name)}
        try:
            yield Lazy(sites, lambda site: outside[site] if site in outside else self._present(site, before))
        finally:
            self._set(before)
            for site, weight in outside.items():
                linear(self._model, site).weight.data.copy_(weight)

    @contextmanager
    def at_full_precision(self, weights: Mapping[Site, Tensor]) -> Iterator[None]:
        with self.unchanged(list(weights)):
            self._set(dict.fromkeys(f"{site.name}.weight" for site in weights))
            for site in weights:
                if not self.block_of(site.name):
                    linear(self._model, site).weight.data.copy_(weights[site])
            yield

    def bias(self, site: Site) -> Tensor | None:
        bias = linear(self._model, site).bias
        return self.read(f"{site.name}.bias").to(self._model.device) if bias is not None and bias.is_meta else bias

    @contextmanager
    def resident(self, block: str) -> Iterator[None]:
        """Inside, the block's parameters are in memory; afterwards too, until others need the room."""
        if block not in self._held:
            while len(self._held) >= _MOST:
                self._drop(next(iter(self._held)))
            self._bring(block)
        self._held.move_to_end(block)
        held = self._held[block]
        held.users += 1
        try:
            yield
        finally:
            held.users -= 1

    @contextmanager
    def whole_graph(self, block: str) -> Iterator[None]:
        self._whole.add(block)
        try:
            yield
        finally:
            self._whole.remove(block)

    def keeps_graph(self, block: str) -> bool:
        """Whether `whole_graph` stands around."""
        return block in self._whole

    def _original(self, site: Site) -> Tensor:
        return self.read(f"{site.name}.weight").to(self._model.device)

    def _present(self, site: Site, rounded: Mapping[str, QuantizedWeight | None]) -> Tensor:
        weight = rounded[f"{site.name}.weight"]
        if weight is None:
            return self._original(site)
        return weight.decode().to(self._model.device, self._places[f"{site.name}.weight"].dtype)

    def _set(self, rounded: Mapping[str, QuantizedWeight | None]) -> None:
        """Have the parameters of these names be what is said, or what the files have (None)."""
        for name, weight in rounded.items():
            if self._rounded.get(name) is weight:
                continue
            self._drop(self.block_of(name))
            if weight is None:
                del self._rounded[name]
            else:
                self._rounded[name] = weight

    def _bring(self, block: str) -> None:
        own, held = self._model.get_submodule(block), _Held()
        with torch.inference_mode(False):  # else no later pass could write them, or have a graph
            for name, parameter in list(own.named_parameters(prefix=block)):
                rounded = self._rounded.get(name)
                values = self.read(name) if rounded is None else rounded.decode().to(parameter.dtype)
                held.empty[name] = parameter
                _put(self._model, name, nn.Parameter(values.to(self._model.device), requires_grad=False))
        self._held[block] = held

    def _drop(self, block: str) -> None:
        held = self._held.pop(block, None)
        if held is None:
            return
        assert not held.users, f"{block} is in use"
        for name, parameter in held.empty.items():
            _put(self._model, name, parameter)

    def block_of(self, name: str) -> str:
        """The block that a parameter belongs to; nothing where it is in none."""
        return next((block for block in self.blocks if name.startswith(f"{block}.")), "")


@dataclass
class _Held:
    """A block that is in memory."""

    empty: dict[str, nn.Parameter] = field(default_factory=dict)  # what its parameters are when it is not, by name
    users: int = 0  # passes that are inside


class _Reading:
    """Stands in for the `forward` of a block: the class's own, with the block in memory.

    A pass whose graph goes on in front of the block keeps what went in and nothing of the block, whose weights would be in memory
    for as long as the graph is; the backward pass runs the block again. Where the graph begins in the block (`passes.forward`),
    its layers' outputs are wanted as they are, and it is kept; and where somebody says so (`Weights.whole_graph`).
    """

    def __init__(self, weights: StreamedWeights, name: str, module: nn.Module) -> None:
        self._weights, self._name, self._module = weights, name, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        in_front = any(isinstance(v, Tensor) and v.requires_grad for v in (*args, *kwargs.values()))
        if in_front and torch.is_grad_enabled() and not self._weights.keeps_graph(self._name):
            return checkpoint(self._run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with self._weights.resident(self._name):
            return type(self._module).forward(self._module, *args, **kwargs)


def streamed_bytes(empty: PreTrainedModel, width: int) -> int:
    """The bytes in memory of weights of `width` bytes each: those outside of the blocks, and of the two largest blocks."""
    blocks = sorted((_num_weights(empty.get_submodule(name)) for name in _blocks(empty)), reverse=True)
    return width * (_num_weights(empty) - sum(blocks[_MOST:]))


def _num_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _blocks(empty: PreTrainedModel) -> list[str]:
    """The blocks of all towers, in the order of the data."""
    towers = [names for tower, names in find_towers(empty).modules.items() if tower != "projector"]
    return [block for names in towers for name in names for block in block_numbers(empty, name)]


def places_of_blocks(empty: PreTrainedModel, device: torch.device) -> tuple[list[str], dict[str, Any]]:
    """The blocks of all towers of a model on the `meta` device, and transformers' device map by which they stay on disk."""
    blocks, places = _blocks(empty), dict[str, Any]()

    def place(module: nn.Module, name: str) -> None:
        inside = f"{name}." if name else ""
        if name in blocks:
            places[name] = "disk"
        elif not any(block.startswith(inside) for block in blocks):
            places[name] = device
        else:
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            places.update({f"{inside}{own_name}": device for own_name, _ in own})
            for child_name, child in module.named_children():
                place(child, f"{inside}{child_name}")

    place(empty, "")
    return blocks, places


def streamed_weights(model: PreTrainedModel, blocks: Sequence[str], device: torch.device) -> StreamedWeights:
    """Take over a model that transformers has loaded with the device map of `places_of_blocks`.

    transformers (accelerate, that is) brings in one module at a time, at every call of it; its index of what is where stays in
    use, because it knows about parameters that are stored under other names.
    """
    index: Mapping[str, Any] = {}
    for module in model.modules():
        loader = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        index = index or getattr(getattr(loader, "dataset", None), "index", {})
        remove_hook_from_module(module)
        vars(module).pop("forward", None)  # what is left of the hook; the class has its own
    for name in ("to", "cuda", "hf_device_map"):
        vars(model).pop(name, None)
    places = {
        name: _Place(index[name]["safetensors_file"], index[name]["weight_name"], parameter.dtype)
        for name, parameter in model.named_parameters()
        if parameter.is_meta
    }
    weights = StreamedWeights(model, blocks, places)
    for name in [name for name in places if not any(name.startswith(f"{block}.") for block in blocks)]:
        _put(model, name, nn.Parameter(weights.read(name).to(device), requires_grad=False))
    return weights


def share_equal(model: nn.Module, other: PreTrainedModel) -> None:
    """Let the parameters of `model` that are equal to those of `other` (token embedding, head) be one memory with them."""
    held = {name: parameter for name, parameter in other.named_parameters() if not parameter.is_meta}
    for name, parameter in model.named_parameters():
        if name in held and parameter.dtype == held[name].dtype and torch.equal(parameter, held[name]):
            parameter.data = held[name].data


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._parameters[leaf] = parameter
