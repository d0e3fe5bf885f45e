"""Products with the few weights that are stored exactly."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mgvq.compiled import njit
from mgvq.kernels.bits import code_at, padded


def multiply_sparse(
    inputs: Float[Tensor, "m in"], positions: UInt8[Tensor, "bytes"], width: int, values: Float[Tensor, "n"], num_out: int
) -> Float[Tensor, "m out"]:
    """The product with a matrix of zeros but for `values`, at the ascending packed places `row * in + column`."""
    outputs = torch.zeros(len(inputs), num_out)
    _add(padded(positions), width, values.float().contiguous().numpy(), inputs.numpy(), outputs.numpy())
    return outputs


@njit
def _add(positions, width, values, inputs, outputs):
    num_in = inputs.shape[1]
    for i in range(len(values)):
        place = np.int64(code_at(positions, i, width))
        row = place // num_in
        for token in range(len(inputs)):
            outputs[token, row] += values[i] * inputs[token, place - row * num_in]
