"""A linear layer that keeps its weight packed."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mgvq.kernels.linear import packed_linear


class Held(nn.Module):
    """Holds stored tensors, which move between devices with the model and never change their dtype, whatever it is cast to.

    A table of fp16 that became bfloat16, and back, would be another table without a word. Parameters, as a bias, are cast.
    """

    def hold(self, role: str, tensor: Tensor, *, own: bool) -> None:
        """Take a tensor; a role `0.codes` puts it into a part `0`, so that its name in `state_dict` is the one that is stored.

        One that is not its `own`, which is stored with another layer, is not in its `state_dict`.
        """
        part, _, rest = role.partition(".")
        if rest:
            if part not in self._modules:
                self.add_module(part, Held())
            inner = self.get_submodule(part)
            assert isinstance(inner, Held)
            inner.hold(rest, tensor, own=own)
        else:
            self.register_buffer(part, tensor, persistent=own)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def exact(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            as_it_was = isinstance(tensor, nn.Parameter) or moved.dtype == tensor.dtype
            return moved if as_it_was else tensor.to(moved.device)

        return super()._apply(exact, recurse)


class PackedLinear(Held):
    """Memory stays at the stored size, and `packed_linear` multiplies; tables that layers share stay shared."""

    bias: nn.Parameter | None

    def __init__(
        self,
        format_class: Any,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        bias: nn.Parameter | None,
        stored_as: Mapping[str, str] | None = None,
        name: str = "",
    ) -> None:
        """`stored_as`: the name under which a checkpoint has the tensor of each role, where it is that of another layer.

        `name`: of the layer itself.
        """
        super().__init__()
        self.format_class, self.settings, self.roles = format_class, dict(settings), tuple(tensors)
        self.name, self.stored_as = name, {role: (stored_as or {}).get(role, f"{name}.{role}") for role in tensors}
        for role, tensor in tensors.items():
            self.hold(role, tensor, own=self.is_own(role))
        self.register_parameter("bias", bias)
        self.out_features, self.in_features = settings["shape"]
        self.kernels = True  # False: every call decodes the weight, which gives the very sums of a plain layer

    def is_own(self, role: str) -> bool:
        """Whether the tensor is stored under the layer's own name."""
        return self.stored_as[role] == f"{self.name}.{role}"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by role."""
        return {role: self.get_buffer(role) for role in self.roles}

    @property
    def stored(self) -> Any:
        """The weight as its format has it."""
        return self.format_class.load(self.tensors, **self.settings)

    @property
    def weight(self) -> Tensor:
        """The decoded weight (out, in), float32; on the `meta` device as long as a tensor of it is there.

        transformers asks for it to initialise it while a model is loaded, before the layer has what is stored.
        """
        if any(tensor.is_meta for tensor in self.tensors.values()):
            return torch.empty(self.out_features, self.in_features, device="meta")
        return self.stored.decode()

    def forward(self, inputs: Tensor) -> Tensor:
        return packed_linear(inputs, self)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format_class.format}"
