"""A linear layer that keeps its weight packed and decodes it at every call."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class PackedLinear(torch.nn.Module):
    """Slower than a decoded layer, but memory stays at the stored size; tables that layers share stay shared."""

    def __init__(
        self, format_class: Any, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], bias: Tensor | None
    ) -> None:
        super().__init__()
        self.format_class, self.settings, self.roles, self.bias = format_class, dict(settings), tuple(tensors), bias
        for number, tensor in enumerate(tensors.values()):  # a role may have dots in it, a buffer's name may not
            self.register_buffer(f"packed_{number}", tensor)
        self.out_features, self.in_features = settings["shape"]

    @property
    def weight(self) -> Tensor:
        """The decoded weight (out, in), float32."""
        tensors = {role: self.get_buffer(f"packed_{number}") for number, role in enumerate(self.roles)}
        return self.format_class.load(tensors, **self.settings).decode()

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.nn.functional.linear(inputs, self.weight.to(inputs.dtype), self.bias)
