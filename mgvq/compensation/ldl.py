"""Damped block-LDL factors of a Hessian whose columns are dealt into blocks of equal length (QuIP#)."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.linalg import damping_unit

_TOGETHER = 64  # blocks whose columns of L are made at a time: what is made of all of them is as large as H in float64, twice


@dataclass(frozen=True, slots=True)
class BlockLDL:
    """`H = L D L^T` with a unit block lower triangular L and a block diagonal D, in float32 (docs/method.md, eq. (ldlq))."""

    lower: Float[Tensor, "n n"]
    """L, rows and columns in the order of the slots."""
    root: Float[Tensor, "blocks d d"]
    """The blocks of D are `root[b]^T root[b]`. The column of a slot that pads a short block is zero: its error costs nothing."""
    damping: float
    """The damping that was needed, as a share."""


_kept: ContextVar[dict[tuple[object, ...], BlockLDL] | None] = ContextVar("kept", default=None)


@contextmanager
def factors_kept() -> Iterator[None]:
    """Inside, the factors of a matrix whose columns are dealt out in the same way are computed once, and kept until the end.

    The trials of a block round its layers to several targets in one metric; the factors take as much memory as that.
    """
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def block_ldl(hessian: Float[Tensor, "in in"], slots: Int[Tensor, "blocks d"], damping: float, of: str = "mean") -> BlockLDL:
    """Factor the damped `hessian` with its channels in the order of `slots`, where -1 marks padding.

    `H = C C^T` (Cholesky in float64) gives `D[b] = C_bb C_bb^T` and `L_:b = C_:b C_bb^-1`. `damping` times `linalg.damping_unit`
    is added to the diagonal, ten times more after every failure, the unit itself at the last. Raises ValueError where even that
    does not help: H is not finite. Inside `factors_kept` nothing is computed twice.
    """
    if (kept := _kept.get()) is None:
        return _block_ldl(hessian, slots, damping, of)
    key = (
        *(hashlib.sha256(t.detach().cpu().contiguous().numpy().data).digest() for t in (hessian, slots)),
        slots.shape,
        damping,
        of,
    )
    if key not in kept:
        kept[key] = _block_ldl(hessian, slots, damping, of)
    return kept[key]


def _block_ldl(hessian: Float[Tensor, "in in"], slots: Int[Tensor, "blocks d"], damping: float, of: str) -> BlockLDL:
    blocks, length = slots.shape
    order = slots.flatten()
    real = order >= 0
    chosen = order.clamp(min=0)
    permuted = hessian[chosen[:, None], chosen].double()  # the one wide copy beside its factor: H of a wide layer fills memory
    permuted[~real] = 0
    permuted[:, ~real] = 0
    unit = torch.zeros_like(permuted.diagonal())
    unit[real] = damping_unit(permuted.diagonal()[real], of)
    mean = permuted.diagonal()[real].mean().clamp(min=1e-30)
    permuted /= mean
    permuted.diagonal()[~real] = 1.0
    factor, damping = _cholesky(permuted, unit / mean, damping)
    del permuted
    tiles = factor.view(blocks, length, blocks, length)
    at = torch.arange(blocks)
    diagonal = tiles[at, :, at]
    inverse = torch.linalg.solve_triangular(diagonal, torch.eye(length, dtype=torch.float64, device=factor.device), upper=False)
    lower = torch.empty(factor.shape, dtype=torch.float32, device=factor.device)
    into = lower.view(-1, blocks, length)
    for first in range(0, blocks, _TOGETHER):
        own = slice(first, first + _TOGETHER)
        into[:, own] = torch.einsum("ibj,bjk->ibk", factor.view(-1, blocks, length)[:, own], inverse[own])
    root = diagonal.transpose(1, 2) * real.view(blocks, 1, length) * mean.sqrt()
    return BlockLDL(lower, root.float(), damping)


def _cholesky(matrix: Float[Tensor, "n n"], unit: Float[Tensor, "n"], damping: float) -> tuple[Float[Tensor, "n n"], float]:
    """The factor of the damped matrix, whose diagonal is written into, and the damping."""
    own = matrix.diagonal().clone()
    while True:
        matrix.diagonal().copy_(own + damping * unit)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed and torch.isfinite(factor.diagonal()).all():  # what is not finite reaches the diagonal of its row
            return factor, damping
        if damping >= 1:
            break
        damping = min(1.0, 10 * damping)
    raise ValueError(
        "the Hessian has no Cholesky factor even when its diagonal is doubled: it is not finite or far from positive"
    )
