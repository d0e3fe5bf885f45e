"""Products with uniform grids: `y_r = sum_g scale_rg (sum_i code_ri x_i - zero_rg sum_i x_i)`, over the channels i of a group."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mgvq.compiled import njit
from mgvq.kernels.look_up import look_up
from mgvq.kernels.workers import share_out


def multiply_codes(
    inputs: Float[Tensor, "m in"], packed: UInt8[Tensor, "bytes"], bits: int, scales: Float[Tensor, "out groups"], group_size: int
) -> Float[Tensor, "m out"]:
    """The product with the codes times their scales, zero points apart: codes of a byte as numbers, smaller ones by look-up."""
    if bits < 8:
        levels = torch.arange(2.0**bits)
        return look_up(packed, inputs[:, :, None] * levels, scales, group_size)
    num_out, num_in = len(scales), inputs.shape[1]
    outputs = torch.zeros(len(inputs), num_out)
    arrays = packed.view(num_out, num_in).numpy(), inputs.numpy(), scales.float().contiguous().numpy()
    share_out(_add_numbers, num_out, num_out * num_in, *arrays, group_size, outputs.numpy())
    return outputs


def group_sums(inputs: Float[Tensor, "m in"], group_size: int) -> Float[Tensor, "m groups"]:
    """The sums of the inputs of every group of channels."""
    return torch.nn.functional.pad(inputs, (0, -inputs.shape[1] % group_size)).unflatten(1, (-1, group_size)).sum(2)


@njit(reorder=True)
def _add_numbers(first, last, codes, inputs, scales, group_size, outputs):
    num_in = codes.shape[1]
    for row in range(first, last):
        for token in range(len(inputs)):
            total = np.float32(0)
            for group in range(scales.shape[1]):
                part = np.float32(0)
                for i in range(group * group_size, min((group + 1) * group_size, num_in)):
                    part += np.float32(codes[row, i]) * inputs[token, i]
                total += part * scales[row, group]
            outputs[token, row] = total
