"""A model whose layers are packed: made of an empty one and a checkpoint, decoded, and saved again."""

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mgvq.checkpoint.contents import FORMATS, Contents, check_layer
from mgvq.checkpoint.digests import write_digests
from mgvq.checkpoint.files import SHARD_BYTES, plain_tensors, write_config, write_generation, write_weights
from mgvq.checkpoint.index import ADVICE, Packed
from mgvq.checkpoint.linear import Held, PackedLinear
from mgvq.errors import UserError
from mgvq.model.files import read_json
from mgvq.model.health import is_finite
from mgvq.model.load import as_stored
from mgvq.model.terms import term_files


class Placing:
    """Places for a checkpoint's tensors in a model on the `meta` device, and what is left to do once transformers has read them.

    A linear layer becomes a `PackedLinear`. An embedding, which is looked up row by row, steps aside until its tensors are
    read, and comes back decoded; a head that is tied to it waits without a weight. A head that is stored beside the embedding
    is one of its own, whatever the config says.
    """

    def __init__(self, model: PreTrainedModel, contents: Contents, dtype: torch.dtype) -> None:
        """Raises UserError, with the file, where checkpoint and config.json do not fit each other: nothing is drawn at random."""
        self.model, self.contents, self.dtype = model, contents, dtype
        self.layers: dict[str, PackedLinear] = {}
        self.aside: dict[str, nn.Module] = {}  # embeddings, by name
        self.tied: dict[str, str] = {}  # weights that are those of an embedding which steps aside, by name, and its weight
        read_json(contents.folder / "generation_config.json")  # transformers would go on without it
        for name, layer in contents.index.layers.items():
            self._place(name, layer)
        self._untie()
        self._compare()

    def finish(self) -> None:
        """Give the layers what they share, bring embeddings back, and give the model a way to be saved.

        Raises UserError, with the file, for numbers that are NaN or infinite, and for indices that are out of range.
        """
        held = {**self.layers, **{name: self.model.get_submodule(name) for name in self.aside}}
        stored = {key: held[name].get_buffer(role) for name, role, key in self._roles() if key == f"{name}.{role}"}
        for layer in self.layers.values():
            where = next((layer.get_buffer(role).device for role in layer.roles if layer.is_own(role)), None)
            for role in layer.roles:
                if not layer.is_own(role):
                    layer.hold(role, stored[layer.stored_as[role]].to(where), own=False)
        self._check_numbers(held)
        saver = SavePacked(self.model, self.contents)
        for name, module in self.aside.items():
            packed = self.contents.index.layers[name]
            tensors = {role: held[name].get_buffer(role) for role in packed.tensors}
            saver.embeddings[name] = packed, {packed.tensors[role]: tensor.cpu() for role, tensor in tensors.items()}
            decoded = FORMATS[packed.format].load(tensors, **packed.settings).decode()
            module.weight = nn.Parameter(decoded.to(width(self.model, f"{name}.weight", self.dtype)), requires_grad=False)
            self.model.set_submodule(name, module)
        for target, source in self.tied.items():
            setattr(self.model.get_submodule(target.rpartition(".")[0]), "weight", self.model.get_parameter(source))  # noqa: B010
            self.model.all_tied_weights_keys[target] = source
        vars(self.model)["save_pretrained"] = saver

    def _place(self, name: str, layer: Packed) -> None:
        try:
            module: Any = self.model.get_submodule(name)
            fits = isinstance(module, nn.Linear | nn.Embedding) and tuple(module.weight.shape) == tuple(layer.settings["shape"])
        except AttributeError:
            fits = False
        if not fits:
            raise self._unfit(f"{name} is no layer of {layer.settings['shape'][0]} x {layer.settings['shape'][1]} weights there")
        tensors = {role: self.contents.headers[key] for role, key in layer.tensors.items()}
        if isinstance(module, nn.Linear):
            placed = PackedLinear(FORMATS[layer.format], layer.settings, tensors, module.bias, layer.tensors, name)
            self.layers[name] = placed
        else:
            placed = Held()
            for role, tensor in tensors.items():
                placed.hold(role, tensor, own=True)
            self.aside[name] = module
        self.model.set_submodule(name, placed)

    def _untie(self) -> None:
        """Take out of transformers' hands the ties that it could not make: those of weights that are packed."""
        ties = self.model.all_tied_weights_keys
        for tie in list(ties.items()):
            for packed, other in (tie, tie[::-1]):
                name = packed.rpartition(".")[0]
                if name not in self.contents.index.layers:
                    continue
                ties.pop(tie[0], None)
                there = other in self.contents.headers or other.rpartition(".")[0] in self.contents.index.layers
                if not there and name in self.aside:
                    waiting: Any = self.model.get_submodule(other.rpartition(".")[0])
                    waiting.weight, waiting._is_hf_initialized = None, True
                    self.tied[other] = packed
                break

    def _compare(self) -> None:
        """Raises UserError unless the checkpoint has what the model lacks, and nothing else, in the same shapes."""
        wanted, found = self.model.state_dict(), self.contents.headers
        ties = self.model.all_tied_weights_keys
        same = {name: {source, *(t for t, s in ties.items() if s == source)} for name, source in ties.items()}
        same |= {source: same[target] for target, source in ties.items()}
        missing = [name for name in wanted if name not in found and not same.get(name, set()) & found.keys()]
        unexpected = [name for name in found if name not in wanted]
        if missing or unexpected:
            raise self._unfit(f"missing {missing[:3]}, unexpected {unexpected[:3]}")
        if other := [name for name, tensor in found.items() if tensor.shape != wanted[name].shape]:
            name = other[0]
            raise self._unfit(f"{name} is {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)}")

    def _check_numbers(self, held: Mapping[str, nn.Module]) -> None:
        for name, layer in self.contents.index.layers.items():
            check_layer(self.contents, name, {role: held[name].get_buffer(role) for role in layer.tensors})
        if bad := [name for name, tensor in self.model.state_dict().items() if not is_finite(tensor)]:
            file = self.contents.shard.get(bad[0], self.contents.shards[0])
            raise UserError(f"{file}: {len(bad)} tensors are NaN or infinite, the first {bad[0]}. {ADVICE}")

    def _roles(self) -> Iterator[tuple[str, str, str]]:
        """Layer, role and name of the stored tensor, of all of them."""
        for name, layer in self.contents.index.layers.items():
            for role, key in layer.tensors.items():
                yield name, role, key

    def _unfit(self, why: str) -> UserError:
        files = ", ".join([self.contents.index_file.name, *self.contents.index.shards])
        return UserError(f"{self.contents.folder} ({files}) does not fit its config.json: {why}. {ADVICE}")


class SavePacked:
    """`save_pretrained` of a packed model: what transformers itself would write is a file called model.safetensors."""

    def __init__(self, model: PreTrainedModel, contents: Contents) -> None:
        self.model, self.source = model, contents.folder
        self.source_dtype: torch.dtype = getattr(torch, contents.index.source_dtype)
        self.embeddings: dict[str, tuple[Packed, dict[str, Tensor]]] = {}  # packed ones, which the model has decoded

    def __call__(self, save_directory: str | Path, *, max_shard_size: int = SHARD_BYTES) -> None:
        """Write the checkpoint again: the bytes of the one that was loaded, unless something was changed.

        The processor is saved by itself, as with any model of transformers. `max_shard_size`: in bytes.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors, layers = {}, {}
        for name, layer in packed_layers(self.model):
            stored = {role: layer.stored_as[role] for role in layer.roles}
            layers[name] = Packed(layer.format_class.format, layer.settings, stored)
            tensors |= {key: layer.get_buffer(role) for role, key in stored.items() if layer.is_own(role)}
        for name, (packed, own) in self.embeddings.items():
            layers[name] = packed
            tensors |= own
        left_out = {*tensors, *(f"{name}.weight" for name in self.embeddings)}
        plain = {name: tensor for name, tensor in plain_tensors(self.model).items() if name not in left_out}
        tensors |= {name: as_stored(tensor, self.source_dtype) for name, tensor in plain.items()}
        write_weights(folder, tensors, layers, self.source_dtype, max_shard_size)
        config: Any = self.model.config.quantization_config
        write_config(folder, self.model, self.source_dtype, config.described)
        write_generation(folder, self.model)
        if self.source.is_dir() and self.source.resolve() != folder.resolve():
            for file in (*self.source.glob("*.py"), *self.source.glob("README.md"), *term_files(self.source)):
                shutil.copyfile(file, folder / file.name)
        write_digests(folder, closed=False)


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """The packed layers of a model, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear))


def decode_layers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Put plain linear layers of `dtype` in the place of packed ones, one after the other."""
    for name, layer in list(packed_layers(model)):
        linear: Any = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = layer.weight.to(width(model, f"{name}.weight", dtype))
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        model.set_submodule(name, linear.train(layer.training))
    vars(model).pop("save_pretrained", None)


def width(model: PreTrainedModel, key: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter: some classes keep some modules in float32 when they are loaded in 16 bits."""
    plan = model._get_dtype_plan(dtype).items()
    return next((wide for name, wide in plan if re.search(rf"(^|\.){re.escape(name)}(\.|$)", key)), dtype)
