"""Two-sided block-LDL rounding of tiles: codes that cover several rows, each corrected in later columns and in earlier rows."""

from collections.abc import Sequence
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from mgvq.compensation.ldl import block_ldl
from mgvq.compensation.ldlq import first_flags, rounding_order, slots_of
from mgvq.protocols import FittedSlice
from mgvq.types import Metric


def tile_by_tile(
    weight: Float[Tensor, "out in"],
    metric: Metric,
    slices: Sequence[FittedSlice],
    score: Float[Tensor, "in"],
    run: int,
    damping: float,
    output_damping: float,
    damping_of: str,
    flags: list[str],
) -> Sequence[Tensor]:
    """The codes of every channel slice, whose tiles are `run` rows of one vector; flags as `HessianTwoSided`.

    With `h_in = L D L^T` and `h_out = M S M^T`, M unit block lower triangular with blocks of `run` rows, a tile is rounded at its
    entry of `W + (M^T Delta L - Delta)` (docs/method.md, eq. (two-sided-ldlq)), to the plain nearest of its codes. It depends on
    the tiles of later rows and of vectors that come before it alone, so that all tiles of an anti-diagonal are rounded at once.
    Rows keep their order, the last run first; rows that fill up the last run are zero. `metric` is on the weight's device and has
    one input and one output factor.
    """
    h_out = metric.dense_h_out()
    assert h_out is not None
    order = rounding_order(slices, score)
    length = max(fitted.codebook.vector_length for fitted in slices)
    slots = torch.stack([slots_of(slices[p], v, length) for p, v in order]).to(weight.device)
    rows = pad(torch.arange(len(weight), device=weight.device), (0, -len(weight) % run), value=-1).view(-1, run)
    name = slices[0].channel_slice.site.name
    inner, outer = (
        block_ldl(metric.h_in[0], slots, damping, damping_of),
        block_ldl(h_out, rows, output_damping, damping_of),
    )
    first_flags(name, metric, inner.damping, damping, flags)
    if outer.damping > output_damping:
        flags.append(f"output_damping:{name}:{outer.damping:g}")

    ordered = weight.float()[:, slots.flatten().clamp(min=0)] * (slots.flatten() >= 0)
    ordered = pad(ordered, (0, 0, 0, -len(weight) % run))
    target, along = ordered.clone(), torch.zeros_like(ordered)  # where tiles are rounded; what earlier vectors add to them
    codes: dict[tuple[int, int, int], Tensor] = {}
    for wave in range(len(rows) + len(order) - 1):
        first = max(0, wave - len(order) + 1)
        tiles = [(len(rows) - 1 - i, len(order) - 1 - (wave - i)) for i in range(first, min(wave + 1, len(rows)))]
        for p, group in groupby(tiles, lambda tile: order[tile[1]][0]):
            together, codebook = list(group), slices[p].codebook
            own = codebook.vector_length
            places = [(slice(r * run, (r + 1) * run), slice(j * length, j * length + own)) for r, j in together]
            aims = torch.cat([target[place] for place in places])
            found, values = codebook.encode(aims[:, None], 0, None)
            per_tile = len(found) // len(together)
            for n, ((r, j), (down, across)) in enumerate(zip(together, places, strict=True)):
                codes[r, p, order[j][1]] = found[n * per_tile : (n + 1) * per_tile]
                error = ordered[down, across] - values[n * run : (n + 1) * run, 0]
                fed = error @ inner.lower[across, : j * length]
                along[down, : j * length] += fed
                target[down, : j * length] += fed
                target[: r * run, across] += outer.lower[down, : r * run].T @ (error + along[down, across])
    counts = [sum(1 for q, _ in order if q == p) for p in range(len(slices))]
    return [
        torch.cat([torch.cat([codes[r, p, v] for v in range(count)], 1) for r in range(len(rows))])
        for p, count in enumerate(counts)
    ]
