"""The points of the lattice codes, by their numbers (QuIP#, Tseng et al. 2024), at the lattice's own scale.

E8P: 16 bits for 8 weights. Bits 8 to 15 name one of 256 vectors of absolute values, bits 1 to 7 the signs of the first seven
weights (1: negative), bit 0 a shift of all weights by +1/4 or -1/4 (1). The sign of the eighth weight makes the sum before the
shift even: a point of D8 + 1/2, and after it a point of E8 + 1/4.
"""

from functools import lru_cache
from itertools import combinations, product

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

DIMENSION = 8
SHIFT = 0.25


def e8p_points(codes: Int[Tensor, "*n"]) -> Float[Tensor, "*n 8"]:
    """The points of codes of [0, 2^16); float32, exact for every device."""
    magnitudes = torch.from_numpy(absolute_values()).to(codes.device)[codes.long() >> 8]
    negative = codes[..., None] >> torch.arange(1, DIMENSION, device=codes.device) & 1
    last = (negative.sum(-1, keepdim=True) + magnitudes.sum(-1, keepdim=True).long()) % 2
    signs = 1 - 2 * torch.cat([negative, last], -1).float()
    return signs * magnitudes + SHIFT * (1 - 2 * (codes & 1).float())[..., None]


def e8_points(codes: Int[Tensor, "*n"]) -> Float[Tensor, "*n 8"]:
    """The points of E8 that the codes of [0, 2^8) name: 1 bit a weight; float32, exact for every device."""
    return torch.from_numpy(shortest()).to(codes.device)[codes.long()]


@lru_cache(maxsize=1)
def absolute_values() -> NDArray[np.float32]:
    """256 vectors of half-integers, "256 8": the 227 of norm^2 <= 10, and 29 of the 56 of norm^2 12 with five entries of 3/2.

    Which 29 the distortion does not care about (all 56 are alike under permutation): the first in lexicographic order of the
    doubled vectors' entries. Ascending by norm, then lexicographic.
    """
    whole = [v for v in product((1, 3, 5), repeat=DIMENSION) if sum(x * x for x in v) <= 40]  # doubled
    filling = [tuple(3 if i in chosen else 1 for i in range(DIMENSION)) for chosen in combinations(range(DIMENSION), 5)]
    ordered = sorted(whole, key=lambda v: (sum(x * x for x in v), v)) + sorted(filling)
    return (np.array(ordered[:256]) / 2).astype(np.float32)


@lru_cache(maxsize=1)
def shortest() -> NDArray[np.float32]:
    """256 points of E8, "256 8": the origin, all 240 of norm^2 2, and 15 of the 16 of norm^2 4 on the axes."""
    roots = [np.eye(DIMENSION)[i] * a + np.eye(DIMENSION)[j] * b
             for i, j in combinations(range(DIMENSION), 2) for a, b in product((1, -1), repeat=2)]  # fmt: skip
    halves = [np.array(v) / 2 for v in product((1, -1), repeat=DIMENSION) if v.count(-1) % 2 == 0]
    axes = [2 * a * np.eye(DIMENSION)[i] for a in (1, -1) for i in range(DIMENSION)]
    return np.array([np.zeros(DIMENSION), *roots, *halves, *axes[:-1]], np.float32)
