"""Rotations of a few vectors: those of `mgvq.rotation`, without a pass over memory for every power of two."""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.compiled import njit
from mgvq.rotation import dct


def turn(
    x: Float[Tensor, "m n"], signs: Float[Tensor, "n"], groups: Int[Tensor, "n"] | None = None, back: bool = False
) -> Float[Tensor, "m n"]:
    """`H S x` of every row, or `(H S)^-1 x`, float32; within each of the `groups` of channels, or of all together."""
    if groups is None:
        return _turn(x, signs, back)
    y = torch.empty_like(x)
    for group in groups.unique():
        channels = torch.nonzero(groups == group).flatten()
        y[:, channels] = _turn(x[:, channels], signs[channels], back)
    return y


def _turn(x: Float[Tensor, "m n"], signs: Float[Tensor, "n"], back: bool) -> Float[Tensor, "m n"]:
    n = x.shape[1]
    power = n & -n
    y = x.clone() if back else x * signs
    if n > power:
        y = (y.reshape(-1, n // power) @ _factor(n // power, back)).view(-1, n)
    _sylvester(y.numpy(), power, np.float32(power**-0.5))
    return y * signs if back else y


@lru_cache(maxsize=16)
def _factor(m: int, back: bool) -> Float[Tensor, "m m"]:
    matrix = dct(m).float()
    return matrix if back else matrix.T.contiguous()


@njit
def _sylvester(x, power, scale):
    """Sums and differences over one bit of the first index after the other; the second one runs over n / power channels."""
    num_vectors, n = x.shape
    for vector in range(num_vectors):
        row = x[vector]
        width = n // power
        while width < n:
            for start in range(0, n, 2 * width):
                first, second = row[start : start + width], row[start + width : start + 2 * width]
                for i in range(width):
                    first[i], second[i] = first[i] + second[i], first[i] - second[i]
            width *= 2
        for i in range(n):
            row[i] *= scale
