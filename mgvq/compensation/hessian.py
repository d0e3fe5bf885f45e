"""Second-order compensation: the error of what is rounded is corrected in what is still free (LDLQ; GPTQ; method 2.0, 3.9)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.compensation.ldl import BlockLDL, block_ldl
from mgvq.errors import UserError
from mgvq.types import FittedCodebook, FittedPiece, Metric

_BATCH = 128  # columns whose feedback is kept local before it reaches all others in one product


@dataclass(frozen=True, kw_only=True)
class Hessian:
    """One-sided block-LDL rounding: vectors one after the other, each in the exact metric of its block.

    The vector with the most sensitive channels is rounded first, so that all others can make up for its error (GPTQ's act-order
    where the sensitivity is gram_diag); equal scores: in the order of the channels. With `H = L D L^T` in the reverse of that
    order and `Delta = W - W^`, vector j is rounded at `W_j + sum_{i>j} Delta_i L_ij` in the metric `D_j`, and `tr(Delta H
    Delta^T)` is the sum of what these roundings cost. The output factor of the metric does not change the feedback (method 3.9
    v) and is not looked at.

    Flags: `damping:<site>:<share>` where more damping was needed, `dead_channels:<site>:<number>` of inputs that were always
    zero (their weights are rounded to nearest).
    """

    damping: float  # share of the mean diagonal that is added to it
    needs_metric: ClassVar[bool] = True
    uses_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise UserError(f"compensation.damping must lie in (0, 1], got {self.damping!r}")

    def round(
        self,
        weight: Float[Tensor, "out in"],
        metric: Metric | None,
        pieces: Sequence[FittedPiece],
        score: Float[Tensor, "in"],
        flags: list[str],
    ) -> Sequence[Tensor]:
        assert metric is not None, "the pipeline checks needs_metric"
        name = pieces[0].piece.site.name
        if dead := int((metric.channel_energy() <= 0).sum()):
            flags.append(f"dead_channels:{name}:{dead}")
        order = _order(pieces, score)
        length = max(fitted.codebook.vector_length for fitted in pieces)
        slots = torch.stack([_slots(pieces[p], v, length) for p, v in order]).to(weight.device)
        factors = [block_ldl(h.to(weight.device), slots, self.damping) for h in metric.h_in]
        if (most := max(f.damping for f in factors)) > self.damping:
            flags.append(f"damping:{name}:{most:g}")
        ordered = weight.float()[:, slots.flatten().clamp(min=0)] * (slots.flatten() >= 0)
        runs = _runs(weight.shape[0], len(factors))
        codes = [_feedback(ordered[run], _restricted(pieces, run), order, f) for run, f in zip(runs, factors, strict=True)]
        return [
            torch.stack([torch.cat([part[p, v] for part in codes]) for v in range(_num_vectors(fitted))], 1)
            for p, fitted in enumerate(pieces)
        ]


def _num_vectors(fitted: FittedPiece) -> int:
    return -(-len(fitted.piece.columns) // fitted.codebook.vector_length)


def _runs(num_rows: int, number: int) -> list[slice]:
    """Runs of rows of equal size, the last one shorter (as `Metric` deals them)."""
    size = -(-num_rows // number)
    return [slice(at, min(at + size, num_rows)) for at in range(0, num_rows, size)]


def _restricted(pieces: Sequence[FittedPiece], rows: slice) -> list[FittedCodebook]:
    return [fitted.codebook.rows(rows) for fitted in pieces]


def _order(pieces: Sequence[FittedPiece], score: Float[Tensor, "in"]) -> list[tuple[int, int]]:
    """(piece, vector) from the one that is rounded last to the one that is rounded first."""
    places, sensitivity = [], []
    for p, fitted in enumerate(pieces):
        own = score.cpu().double()[fitted.piece.columns.cpu().long()]
        for v, part in enumerate(own.split(fitted.codebook.vector_length)):
            places.append((p, v))
            sensitivity.append(part.mean())
    descending = torch.argsort(torch.stack(sensitivity), descending=True, stable=True)
    return [places[i] for i in reversed(descending.tolist())]


def _slots(fitted: FittedPiece, vector: int, length: int) -> Int[Tensor, "d"]:
    """The channels of a vector, -1 behind them up to `length`."""
    own = fitted.codebook.vector_length
    channels = fitted.piece.columns[vector * own : (vector + 1) * own].long().cpu()
    return torch.nn.functional.pad(channels, (0, length - len(channels)), value=-1)


def _feedback(
    weight: Float[Tensor, "rows n"], codebooks: Sequence[FittedCodebook], order: Sequence[tuple[int, int]], factors: BlockLDL
) -> dict[tuple[int, int], Tensor]:
    """The codes by (piece, vector). `weight` and `factors` have their columns in `order`."""
    length = weight.shape[1] // len(order)
    codes: dict[tuple[int, int], Tensor] = {}
    target, error = weight.clone(), torch.zeros_like(weight)
    per_batch = max(1, _BATCH // length)
    for stop in range(len(order), 0, -per_batch):
        first = max(0, stop - per_batch) * length
        for at in range(stop - 1, first // length - 1, -1):
            p, v = order[at]
            begin, own = at * length, codebooks[p].vector_length
            here = slice(begin, begin + own)
            code, values = codebooks[p].encode(target[:, None, here], v, factors.root[at, :own, :own])
            codes[p, v] = code[:, 0]
            error[:, here] = weight[:, here] - values[:, 0]
            target[:, first:begin].addmm_(error[:, here], factors.lower[here, first:begin])
        done = slice(first, stop * length)
        target[:, :first].addmm_(error[:, done], factors.lower[done, :first])
    return codes
