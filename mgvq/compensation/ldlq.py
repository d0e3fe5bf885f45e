"""LDLQ, the loop of every second-order rounding: vectors one after the other, each error corrected in those still free."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.compensation.ldl import BlockLDL, block_ldl
from mgvq.protocols import FittedCodebook, FittedSlice
from mgvq.types import Metric

BATCH = 128  # columns whose feedback is kept local before it reaches all others in one product

Coded = tuple[Tensor, Float[Tensor, "rows d"]]  # the codes of one vector of every row, and what they stand for
Encode = Callable[[Float[Tensor, "rows d"]], Coded]
Choose = Callable[[Encode, Float[Tensor, "rows d"], Float[Tensor, "rows d"]], Coded]


def ldlq(
    weight: Float[Tensor, "out in"],
    metric: Metric,
    slices: Sequence[FittedSlice],
    score: Float[Tensor, "in"],
    damping: float,
    damping_of: str,
    flags: list[str],
    choose: Choose,
    met: Float[Tensor, "out in"] | None = None,
) -> Sequence[Tensor]:
    """Return the codes of every channel slice, and append the flags that `Hessian` names to `flags`.

    The vector of the highest mean score is rounded first, so that all others can make up for its error. With
    `H = L D L^T` in the reverse of that order and `Delta = W - W^`, vector j has the target `W_j + sum_{i>j} Delta_i L_ij` and
    the metric `D_j` (docs/method.md, eq. (ldlq)). `choose(encode, target, W_j)` makes its codes, where `encode` finds the codes
    that are nearest in that metric. `metric` is on the device of the weight. Where `met` is given, the targets that codes were
    last looked for are written into it.
    """
    name = slices[0].channel_slice.site.name
    order = rounding_order(slices, score)
    length = max(fitted.codebook.vector_length for fitted in slices)
    slots = torch.stack([slots_of(slices[p], v, length) for p, v in order]).to(weight.device)
    runs = metric.row_runs(len(weight))
    factors = [block_ldl(h_in, slots, damping, damping_of) for _, h_in in runs]
    first_flags(name, metric, max(f.damping for f in factors), damping, flags)
    ordered = weight.float()[:, slots.flatten().clamp(min=0)] * (slots.flatten() >= 0)
    aims = torch.zeros_like(ordered)
    codes = [
        _round(ordered[rows], _restricted(slices, rows), order, f, choose, aims[rows])
        for (rows, _), f in zip(runs, factors, strict=True)
    ]
    if met is not None:
        real = slots.flatten() >= 0
        met[:, slots.flatten()[real]] = aims[:, real]
    return [
        torch.stack([torch.cat([part[p, v] for part in codes]) for v in range(_num_vectors(fitted))], 1)
        for p, fitted in enumerate(slices)
    ]


def first_flags(name: str, metric: Metric, needed: float, damping: float, flags: list[str]) -> None:
    """Append `dead_channels:<site>:<number>` and `damping:<site>:<share>` where there are such, or more was needed."""
    if dead := int((metric.channel_importance() <= 0).sum()):
        flags.append(f"dead_channels:{name}:{dead}")
    if needed > damping:
        flags.append(f"damping:{name}:{needed:g}")


def expected_damage(score: Float[Tensor, "in"], slices: Sequence[FittedSlice]) -> Float[Tensor, "in"]:
    """The score of every channel times the distortion of its slice's rate: what it is to cost to round the channel."""
    damage = score.cpu().double()
    for fitted in slices:
        damage[fitted.channel_slice.columns.cpu().long()] *= fitted.distortion
    return damage


def _num_vectors(fitted: FittedSlice) -> int:
    return -(-len(fitted.channel_slice.columns) // fitted.codebook.vector_length)


def _restricted(slices: Sequence[FittedSlice], rows: slice) -> list[FittedCodebook]:
    return [fitted.codebook.rows(rows) for fitted in slices]


def rounding_order(slices: Sequence[FittedSlice], score: Float[Tensor, "in"]) -> list[tuple[int, int]]:
    """Return (channel slice, vector) pairs from the vector that is rounded last to the one that is rounded first."""
    places, sensitivity = [], []
    for p, fitted in enumerate(slices):
        own = score.cpu().double()[fitted.channel_slice.columns.cpu().long()]
        for v, part in enumerate(own.split(fitted.codebook.vector_length)):
            places.append((p, v))
            sensitivity.append(part.mean())
    descending = torch.argsort(torch.stack(sensitivity), descending=True, stable=True)
    return [places[i] for i in reversed(descending.tolist())]


def slots_of(fitted: FittedSlice, vector: int, length: int) -> Int[Tensor, "d"]:
    """Return the channels of a vector, followed by -1 up to `length`."""
    own = fitted.codebook.vector_length
    channels = fitted.channel_slice.columns[vector * own : (vector + 1) * own].long().cpu()
    return torch.nn.functional.pad(channels, (0, length - len(channels)), value=-1)


def _round(
    weight: Float[Tensor, "rows n"],
    codebooks: Sequence[FittedCodebook],
    order: Sequence[tuple[int, int]],
    factors: BlockLDL,
    choose: Choose,
    aims: Float[Tensor, "rows n"],
) -> dict[tuple[int, int], Tensor]:
    """Return the codes by (channel slice, vector); `weight` and `factors` have their columns in `order`.

    What codes were looked for is written into `aims`.
    """
    length = weight.shape[1] // len(order)
    codes: dict[tuple[int, int], Tensor] = {}
    target, error = weight.clone(), torch.zeros_like(weight)
    per_batch = max(1, BATCH // length)
    for stop in range(len(order), 0, -per_batch):
        first = max(0, stop - per_batch) * length
        for at in range(stop - 1, first // length - 1, -1):
            p, v = order[at]
            begin, own = at * length, codebooks[p].vector_length
            here = slice(begin, begin + own)
            encode = partial(_nearest, codebooks[p], v, factors.root[at, :own, :own], aims[:, here])
            codes[p, v], values = choose(encode, target[:, here], weight[:, here])
            error[:, here] = weight[:, here] - values
            target[:, first:begin].addmm_(error[:, here], factors.lower[here, first:begin])
        done = slice(first, stop * length)
        target[:, :first].addmm_(error[:, done], factors.lower[done, :first])
    return codes


def _nearest(
    codebook: FittedCodebook,
    vector: int,
    root: Float[Tensor, "d d"],
    aims: Float[Tensor, "rows d"],
    targets: Float[Tensor, "rows d"],
) -> Coded:
    aims.copy_(targets)
    codes, values = codebook.encode(targets[:, None], vector, root)
    return codes[:, 0], values[:, 0]
