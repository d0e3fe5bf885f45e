"""Products with trellis codes: the states of a walk are windows of its bits, each of which names its weights."""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from mgvq.compiled import njit
from mgvq.kernels.bits import word
from mgvq.kernels.workers import share_out
from mgvq.trellis.code import TrellisCode
from mgvq.trellis.values import state_values

_TILE = 16  # rows and columns
_HALF = 8  # weights whose windows lie in one number of 64 bits, whatever the rate


def multiply_walks(
    inputs: Float[Tensor, "m in"], codes: UInt8[Tensor, "tiles v bytes"], code: TrellisCode, num_out: int
) -> Float[Tensor, "m out"]:
    """The product with a weight as `mgvq.formats.trellis.TrellisWeight` stores it, without its scale."""
    tiles, columns, _ = codes.shape
    filled = torch.nn.functional.pad(inputs, (0, columns * _TILE - inputs.shape[1]))
    outputs = torch.empty(len(inputs), tiles * _TILE)
    values, window = _window_values(code)
    arguments = codes.numpy(), values, window, code.step_bits, code.step_weights, filled.numpy(), outputs.numpy()
    share_out(_multiply, tiles, codes.shape[0] * columns * _TILE * _TILE, *arguments)
    return outputs[:, :num_out]


@lru_cache(maxsize=16)
def _window_values(code: TrellisCode) -> tuple[NDArray[np.float32], int]:
    """The weights of each window of a walk's bits, in a row, and its width: whole steps, with the oldest in the lowest bits.

    A state has its newest step in the lowest bits, and of its oldest one perhaps only some.
    """
    steps = -(-code.state_bits // code.step_bits)
    window = np.arange(1 << steps * code.step_bits)
    state = np.zeros_like(window)
    for back in range(steps):
        new = window >> (steps - 1 - back) * code.step_bits & (1 << code.step_bits) - 1
        state |= new << back * code.step_bits
    return state_values(code).numpy()[state & (1 << code.state_bits) - 1].ravel(), steps * code.step_bits


@njit
def _multiply(first, last, codes, values, window, step_bits, step_weights, inputs, outputs):
    _, columns, num_bytes = codes.shape
    walk = np.zeros(8 + num_bytes + 8, np.uint8)  # a walk bites its tail: before its first byte stand its last ones
    sums = np.empty(_TILE, np.float32)
    for token in range(len(inputs)):
        for tile in range(first, last):
            for row in range(_TILE):
                sums[row] = 0
            for column in range(columns):
                for i in range(8):
                    walk[i] = codes[tile, column, num_bytes - 8 + i]
                for i in range(num_bytes):
                    walk[8 + i] = codes[tile, column, i]
                own = inputs[token, column * _TILE : (column + 1) * _TILE]
                for half in range(2 * _TILE):
                    bit = 64 + half * _HALF // step_weights * step_bits + step_bits - window
                    bits = word(walk, bit >> 3) >> np.uint64(bit & 7)  # begins with the window of the first step
                    x = own[half % 2 * _HALF : (half % 2 + 1) * _HALF]
                    if step_weights == 1:
                        sums[half // 2] += _single(bits, values, window, step_bits, x)
                    else:
                        sums[half // 2] += _pairs(bits, values, window, step_bits, x)
            for row in range(_TILE):
                outputs[token, tile * _TILE + row] = sums[row]


@njit(reorder=True)
def _single(bits, values, window, step_bits, x):
    mask = np.uint64((1 << window) - 1)
    total = np.float32(0)
    for i in range(_HALF):
        total += values[bits >> np.uint64(i * step_bits) & mask] * x[i]
    return total


@njit(reorder=True)
def _pairs(bits, values, window, step_bits, x):
    mask = np.uint64((1 << window) - 1)
    total = np.float32(0)
    for i in range(_HALF // 2):
        state = bits >> np.uint64(i * step_bits) & mask
        total += values[np.uint64(2) * state] * x[2 * i] + values[np.uint64(2) * state + np.uint64(1)] * x[2 * i + 1]
    return total
