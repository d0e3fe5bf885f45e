"""The forward pass of a packed layer: a kernel of its format for few tokens, the decoded weight for many."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

FEW = 8  # tokens up to which kernels beat decoding, most far beyond; `gather` loses a few per cent there (benchmarks/kernels.py)
_NARROW = (torch.float32, torch.bfloat16, torch.float16)  # what float32 holds exactly


def packed_linear(inputs: Float[Tensor, "*b in"], layer: Any) -> Float[Tensor, "*b out"]:
    """`inputs W^T + bias` of a packed layer (`mgvq.checkpoint.linear.PackedLinear`), in the dtype of the inputs.

    Up to `FEW` tokens on the CPU go through the kernel of the layer's format, which sums in float32 and rounds at the end. All
    else (more tokens, another device, float64, inputs whose gradient is asked for, a format without a kernel) decodes the
    weight, rounds it to the dtype of the inputs and multiplies. Both are the same product but for the last digits.
    """
    if not has_kernel(inputs, layer):
        return torch.nn.functional.linear(inputs, layer.weight.to(inputs.dtype), layer.bias)
    tokens = inputs.detach().float().reshape(-1, inputs.shape[-1]).contiguous()
    outputs = layer.format_class.multiply(tokens, layer.tensors, **layer.settings)
    if layer.bias is not None:
        outputs = outputs + layer.bias.detach().float()
    return outputs.to(inputs.dtype).view(*inputs.shape[:-1], -1)


def multiply_by(
    format_class: Any, inputs: Float[Tensor, "m in"], tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> Float[Tensor, "m out"]:
    """The product with a weight inside another one, whose format need not have a kernel. `settings` may name the format."""
    own = {key: value for key, value in settings.items() if key != "format"}
    if hasattr(format_class, "multiply"):
        return format_class.multiply(inputs.contiguous(), tensors, **own)
    return inputs @ format_class.load(tensors, **own).decode().T


def has_kernel(inputs: Float[Tensor, "*b in"], layer: Any) -> bool:
    """Whether `packed_linear` multiplies these inputs without decoding the weight: by what its format offers as `multiply`."""
    num_tokens = inputs.numel() // max(1, inputs.shape[-1])
    return (
        layer.kernels
        and hasattr(layer.format_class, "multiply")
        and 0 < num_tokens <= FEW
        and inputs.device.type == "cpu"
        and inputs.dtype in _NARROW
        and not (torch.is_grad_enabled() and inputs.requires_grad)
        and not torch.compiler.is_compiling()
    )
