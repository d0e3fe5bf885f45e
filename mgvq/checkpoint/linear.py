"""A linear layer that keeps its weight packed and decodes it at every call."""

import torch
from torch import Tensor

from mgvq.types import QuantizedWeight


class PackedLinear(torch.nn.Module):
    """Slower than a decoded layer, but memory stays at the stored size."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed, self.bias, self.dtype = weight, bias, dtype
        self.out_features, self.in_features = weight.shape

    @property
    def weight(self) -> Tensor:
        """The decoded weight (out, in)."""
        return self.packed.decode().to(self.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.nn.functional.linear(inputs, self.weight, self.bias)
