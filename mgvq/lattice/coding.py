"""Vectors of eight weights to lattice codes of 2, 3 or 4 bits a weight and back; a second stage codes what the first leaves."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.lattice.nearest import nearest_e8, nearest_e8p
from mgvq.lattice.points import e8_points, e8p_points

_SEARCH = {16: nearest_e8p, 8: nearest_e8}
_POINTS = {16: e8p_points, 8: e8_points}
STAGES = {2: (16,), 3: (16, 8), 4: (16, 16)}  # bits a weight: of each stage's code of eight (QuIP#, Tseng et al. 2024)


def encode(vectors: Float[Tensor, "n 8"], bits: int, scales: Sequence[float]) -> Int[Tensor, "n stages"]:
    """The codes, int32, of every stage, each the nearest point to what the stages before leave.

    A stage's points are multiplied by its scale: those of a Gaussian of variance 1 are in `codebook/distortion.json`. Raises
    ValueError for other bits than 2, 3 and 4, for anything but one scale > 0 a stage, and for non-finite vectors.
    """
    rest, codes = vectors.float(), []
    for width, scale in zip(_stages(bits, scales), scales, strict=True):
        codes.append(_SEARCH[width](rest / scale))
        rest = rest - _POINTS[width](codes[-1]) * scale
    return torch.stack(codes, 1)


def decode(codes: Int[Tensor, "n stages"], bits: int, scales: Sequence[float]) -> Float[Tensor, "n 8"]:
    """What the codes of `encode` stand for, float32. Raises ValueError as that does."""
    _stages(bits, scales)
    total = torch.zeros(len(codes), 8, device=codes.device)
    for stage, scale in zip(points(codes, bits), scales, strict=True):
        total = total + stage * scale
    return total


def points(codes: Int[Tensor, "n stages"], bits: int) -> list[Float[Tensor, "n 8"]]:
    """The points that the codes of each stage name, before they are scaled, float32."""
    return [_POINTS[width](codes[:, stage]) for stage, width in enumerate(STAGES[bits])]


def _stages(bits: int, scales: Sequence[float]) -> tuple[int, ...]:
    if bits not in STAGES:
        raise ValueError(f"a lattice code has 2, 3 or 4 bits a weight, not {bits}")
    if len(scales) != len(STAGES[bits]) or not all(scale > 0 for scale in scales):
        raise ValueError(f"{bits} bits take {len(STAGES[bits])} scales > 0, got {list(scales)}")
    return STAGES[bits]
