"""A linear layer that keeps its weight packed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mgvq.kernels.linear import packed_linear


class PackedLinear(torch.nn.Module):
    """Memory stays at the stored size, and `packed_linear` multiplies; tables that layers share stay shared."""

    def __init__(
        self, format_class: Any, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], bias: Tensor | None
    ) -> None:
        super().__init__()
        self.format_class, self.settings, self.roles, self.bias = format_class, dict(settings), tuple(tensors), bias
        for number, tensor in enumerate(tensors.values()):  # a role may have dots in it, a buffer's name may not
            self.register_buffer(f"packed_{number}", tensor)
        self.out_features, self.in_features = settings["shape"]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by role."""
        return {role: self.get_buffer(f"packed_{number}") for number, role in enumerate(self.roles)}

    @property
    def weight(self) -> Tensor:
        """The decoded weight (out, in), float32."""
        return self.format_class.load(self.tensors, **self.settings).decode()

    def forward(self, inputs: Tensor) -> Tensor:
        return packed_linear(inputs, self)
