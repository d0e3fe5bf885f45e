"""Products with centroids that are gathered code by code: tables too large to look products up in, and vectors along outputs.

Vectors along outputs of a small table are not gathered: what multiplies a centroid is summed up first, an addition a code.
"""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mgvq.compiled import njit
from mgvq.kernels.bits import code_at, padded
from mgvq.kernels.workers import share_out

_CHUNK = 64  # vectors that are put together in the nearest cache before they are multiplied
_SUMS = 2**14  # sums of inputs that are kept at a time, which the nearest two caches hold


def multiply_rows(
    inputs: Float[Tensor, "m in"],
    packed: UInt8[Tensor, "bytes"],
    width: int,
    tables: Float[Tensor, "t k d"],
    stages: int,
    num_out: int,
) -> Float[Tensor, "m out"]:
    """The product with vectors along the inputs, as `mgvq.formats.vector.VectorWeight` has them; no scale."""
    length = tables.shape[2]
    vectors = -(-inputs.shape[1] // length)
    filled = torch.nn.functional.pad(inputs, (0, vectors * length - inputs.shape[1]))
    outputs = torch.empty(len(inputs), num_out)
    arguments = padded(packed), width, tables.contiguous().numpy(), stages, filled.numpy(), outputs.numpy()
    share_out(_rows, num_out, num_out * vectors * stages, *arguments)
    return outputs


def multiply_columns(
    inputs: Float[Tensor, "m in"],
    packed: UInt8[Tensor, "bytes"],
    width: int,
    tables: Float[Tensor, "t k d"],
    stages: int,
    num_out: int,
) -> Float[Tensor, "m out"]:
    """The product with vectors along the outputs: every input has a vector of each run of them."""
    length = tables.shape[2]
    vectors = -(-num_out // length)
    outputs = torch.zeros(len(inputs), vectors * length)
    arguments = padded(packed), width, tables.contiguous().numpy(), stages, vectors, inputs.numpy(), outputs.numpy()
    summed = 2 * tables.shape[1] <= inputs.shape[1]  # half of the codes, or more, name a centroid that another one names too
    share_out(_columns_summed if summed else _columns, vectors, inputs.shape[1] * vectors * stages, *arguments)
    return outputs[:, :num_out]


@njit(reorder=True)
def _rows(first, last, packed, width, tables, stages, inputs, outputs):
    length, subspaces = tables.shape[2], len(tables) // stages
    vectors = inputs.shape[1] // length
    chunk = np.empty(_CHUNK * length, np.float32)
    for row in range(first, last):
        outputs[:, row] = 0
        for start in range(0, vectors, _CHUNK):
            stop = min(start + _CHUNK, vectors)
            chunk[:] = 0
            for v in range(start, stop):
                for stage in range(stages):
                    code = code_at(packed, (row * vectors + v) * stages + stage, width)
                    centroid = tables[v % subspaces * stages + stage, code]
                    for i in range(length):
                        chunk[(v - start) * length + i] += centroid[i]
            for token in range(len(inputs)):
                total = np.float32(0)
                for i in range((stop - start) * length):
                    total += chunk[i] * inputs[token, start * length + i]
                outputs[token, row] += total


@njit(reorder=True)
def _columns(first, last, packed, width, tables, stages, vectors, inputs, outputs):
    length, subspaces = tables.shape[2], len(tables) // stages
    for channel in range(inputs.shape[1]):
        for v in range(first, last):
            for stage in range(stages):
                code = code_at(packed, (channel * vectors + v) * stages + stage, width)
                centroid = tables[v % subspaces * stages + stage, code]
                for token in range(len(inputs)):
                    for i in range(length):
                        outputs[token, v * length + i] += inputs[token, channel] * centroid[i]


@njit(reorder=True)
def _columns_summed(first, last, packed, width, tables, stages, vectors, inputs, outputs):
    num_centroids, length, subspaces = tables.shape[1], tables.shape[2], len(tables) // stages
    tile = max(1, _SUMS // num_centroids)
    sums = np.empty((tile, num_centroids), np.float32)
    for token in range(len(inputs)):
        for stage in range(stages):
            for start in range(first, last, tile):
                stop = min(start + tile, last)
                sums[:] = 0
                for channel in range(inputs.shape[1]):
                    x = inputs[token, channel]
                    for v in range(start, stop):
                        sums[v - start, code_at(packed, (channel * vectors + v) * stages + stage, width)] += x
                for v in range(start, stop):
                    table = tables[v % subspaces * stages + stage]
                    for centroid in range(num_centroids):
                        for i in range(length):
                            outputs[token, v * length + i] += sums[v - start, centroid] * table[centroid, i]
