"""Products with lattice codes: points of eight weights are made of their absolute values, their signs and their shift."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mgvq.compiled import njit
from mgvq.kernels.workers import share_out
from mgvq.lattice.coding import STAGES
from mgvq.lattice.points import DIMENSION, SHIFT, absolute_values, shortest

_CHUNK = 64  # vectors that are put together in the nearest cache before they are multiplied


def multiply_points(
    inputs: Float[Tensor, "m in"], codes: UInt8[Tensor, "out vectors bytes"], bits: int, scales: Float[Tensor, "stages"]
) -> Float[Tensor, "m out"]:
    """The product with a weight as `mgvq.formats.lattice.LatticeWeight` stores it."""
    filled = torch.nn.functional.pad(inputs, (0, codes.shape[1] * DIMENSION - inputs.shape[1]))
    outputs = torch.empty(len(inputs), len(codes))
    second = STAGES[bits][1] if len(STAGES[bits]) > 1 else 0
    arguments = codes.numpy(), second, scales.float().numpy(), absolute_values(), _signs(), shortest(), filled.numpy()
    share_out(_multiply, len(codes), codes.numel() * DIMENSION, *arguments, outputs.numpy())
    return outputs


def _signs():
    """The signs of the eight weights by the parity that the absolute values leave to them and the lower byte of a code."""
    code = np.arange(256)
    negative = code[:, None] >> np.arange(1, DIMENSION) & 1
    last = (negative.sum(1)[None] + np.arange(2)[:, None]) % 2
    every = np.concatenate([np.broadcast_to(negative, (2, *negative.shape)), last[:, :, None]], 2)
    return (1 - 2 * every).astype(np.float32)


@njit(reorder=True)
def _multiply(first, last, codes, second, scales, magnitudes, signs, short, inputs, outputs):
    _, vectors, _ = codes.shape
    parity = np.empty(len(magnitudes), np.int64)
    for k in range(len(magnitudes)):
        parity[k] = np.int64(magnitudes[k].sum()) % 2
    chunk = np.empty((_CHUNK, DIMENSION), np.float32)
    for row in range(first, last):
        outputs[:, row] = 0
        for start in range(0, vectors, _CHUNK):
            stop = min(start + _CHUNK, vectors)
            for v in range(start, stop):
                code = codes[row, v]
                chunk[v - start] = 0
                _add_point(code[0], code[1], scales[0], magnitudes, signs, parity, chunk[v - start])
                if second == 16:
                    _add_point(code[2], code[3], scales[1], magnitudes, signs, parity, chunk[v - start])
                elif second == 8:
                    for i in range(DIMENSION):
                        chunk[v - start, i] += scales[1] * short[code[2], i]
            for token in range(len(inputs)):
                total = np.float32(0)
                for v in range(stop - start):
                    for i in range(DIMENSION):
                        total += chunk[v, i] * inputs[token, (start + v) * DIMENSION + i]
                outputs[token, row] += total


@njit
def _add_point(low, high, scale, magnitudes, signs, parity, point):
    shift = np.float32(SHIFT) if low & 1 == 0 else np.float32(-SHIFT)
    for i in range(DIMENSION):
        point[i] += scale * (magnitudes[high, i] * signs[parity[high], low, i] + shift)
