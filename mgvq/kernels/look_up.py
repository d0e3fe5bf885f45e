"""Products by look-up: what a code contributes is computed once a token, and then read for every row.

The contribution of position q is `lut[q, c] = x_q . centroid_c`, so that `y_r = sum_q lut[q, code(r, q)]`. Codes of 1, 2 or 4
bits are looked up a whole byte at a time, in the sums of what its codes contribute.
"""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mgvq.compiled import njit
from mgvq.kernels.bits import code_at, padded, word
from mgvq.kernels.workers import share_out

_BLOCK = 16  # bytes of a row whose tables, 16 KiB, stay in the nearest cache while all rows pass
_ENTRIES = 1 << 12  # of the tables of one block where codes are no part of a byte


def contributions(
    inputs: Float[Tensor, "m in"], tables: Float[Tensor, "t k d"], stages: int, entries: int
) -> Float[Tensor, "m q entries"]:
    """The products of every vector of the inputs with the centroids of each of its stages, vector by vector, then stage by stage.

    The tables are those of `VectorWeight`; codes beyond the centroids contribute nothing. A compiled loop, since the threads of a
    product of torch's would spin for a while where those of `look_up` are to run.
    """
    positions = -(-inputs.shape[1] // tables.shape[2]) * stages
    lut = torch.empty(len(inputs), positions, entries)
    _contribute(inputs.numpy(), tables.transpose(1, 2).contiguous().numpy(), stages, lut.numpy())
    return lut


@njit(reorder=True)
def _contribute(inputs, tables, stages, lut):
    num_tables, length, num_centroids = tables.shape
    num_in = inputs.shape[1]
    for token in range(len(inputs)):
        for position in range(lut.shape[1]):
            vector = position // stages
            table = tables[vector % (num_tables // stages) * stages + position % stages]
            row = lut[token, position]
            row[:] = 0
            for i in range(min(length, num_in - vector * length)):
                factor = inputs[token, vector * length + i]
                for centroid in range(num_centroids):
                    row[centroid] += factor * table[i, centroid]


def look_up(
    packed: UInt8[Tensor, "bytes"], lut: Float[Tensor, "m q k"], scales: Float[Tensor, "out groups"], per_group: int
) -> Float[Tensor, "m out"]:
    """The sums over the positions of every row of what its codes contribute, times the scale of their group.

    k is 2 to the power of the codes' width. `per_group`: positions of a group; the last one of a row may be shorter.
    """
    (num_tokens, positions, entries), num_out = lut.shape, len(scales)
    width = (entries - 1).bit_length()
    whole = 8 % width == 0 and positions * width % 8 == 0 and (per_group >= positions or per_group * width % 8 == 0)
    outputs = torch.zeros(num_tokens, num_out)
    arguments = scales.float().contiguous().numpy(), outputs.numpy()
    if whole:
        codes = packed.view(num_out, -1).numpy()
        tables = _bytewise(lut).contiguous().numpy()
        share_out(_add_bytes, num_out, codes.size, codes, tables, max(1, per_group * width // 8), *arguments)
    else:
        tables = lut.contiguous().numpy()
        share_out(_add_codes, num_out, num_out * positions, padded(packed), width, tables, per_group, *arguments)
    return outputs


def _bytewise(lut: Float[Tensor, "m q k"]) -> Float[Tensor, "m bytes 256"]:
    """What bytes contribute: the sums of two neighbours, the first of which lies in the lower bits, until a byte is full."""
    while (entries := lut.shape[2]) < 256:
        joined = torch.empty(lut.shape[0], lut.shape[1] // 2, entries**2)
        _join(lut.contiguous().numpy(), joined.numpy())
        lut = joined
    return lut


@njit
def _join(lut, joined):
    entries = lut.shape[2]
    for token in range(len(lut)):
        for pair in range(joined.shape[1]):
            for high in range(entries):
                for low in range(entries):
                    joined[token, pair, high * entries + low] = lut[token, 2 * pair + 1, high] + lut[token, 2 * pair, low]


@njit(reorder=True)
def _add_bytes(first, last, codes, lut, per_group, scales, outputs):
    num_bytes, flat = codes.shape[1], codes.reshape(-1)
    for token in range(len(lut)):
        start = 0
        while start < num_bytes:
            group = start // per_group
            stop = min(start + _BLOCK, (group + 1) * per_group, num_bytes)
            if stop - start == _BLOCK:
                tables = lut[token].reshape(-1)[256 * start : 256 * stop]
                _add_block(first, last, flat, num_bytes, start, tables, scales[:, group], outputs[token])
            else:
                for row in range(first, last):
                    total = np.float32(0)
                    for i in range(start, stop):
                        total += lut[token, i, codes[row, i]]
                    outputs[token, row] += total * scales[row, group]
            start = stop


@njit(reorder=True)
def _add_block(first, last, codes, num_bytes, start, tables, scales, outputs):
    """`_BLOCK` bytes of every row, out of two numbers: what the compiler knows the length of, it writes out."""
    byte = np.uint64(255)
    for row in range(first, last):
        low, high = word(codes, row * num_bytes + start), word(codes, row * num_bytes + start + 8)
        total, other = np.float32(0), np.float32(0)
        for i in range(8):
            total += tables[np.uint64(256 * i) + (low >> np.uint64(8 * i) & byte)]
            other += tables[np.uint64(256 * (8 + i)) + (high >> np.uint64(8 * i) & byte)]
        outputs[row] += (total + other) * scales[row]


@njit(reorder=True)
def _add_codes(first, last, packed, width, lut, per_group, scales, outputs):
    num_tokens, positions, entries = lut.shape
    block = max(1, _ENTRIES // entries)
    for token in range(num_tokens):
        start = 0
        while start < positions:
            group = start // per_group
            stop = min(start + block, (group + 1) * per_group, positions)
            for row in range(first, last):
                total = np.float32(0)
                for i in range(start, stop):
                    total += lut[token, i, code_at(packed, row * positions + i, width)]
                outputs[token, row] += total * scales[row, group]
            start = stop
