"""Beam search for the codes of additive quantisation: a vector is the sum of one centroid of each of several tables."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.compiled import get_num_threads, njit, prange


def beam_search(
    vectors: Float[Tensor, "n d"], tables: Float[Tensor, "t k d"], root: Float[Tensor, "d d"] | None, width: int
) -> Int[Tensor, "n t"]:
    """The codes, int64, of which `|root (x - sum_i c_i)|^2` is least among those that the search sees; with None, `|x - sum|^2`.

    Table by table the `width` best beginnings are kept (AQLM, Egiazarian et al. 2024); of equal ones those of lower codes. Then
    one code after the other is chosen anew given the others, until none changes: a width of k squared or more is exact for two
    tables, and no width is worse than the greedy choice. On the CPU, with numba's threads, in float32; each vector by itself, so
    that the codes are the same in any company. Raises ValueError for a width below 1.
    """
    if width < 1:
        raise ValueError(f"a beam is 1 wide or more, got {width}")
    turn = torch.eye(vectors.shape[1], dtype=torch.float64) if root is None else root.double().cpu()
    turned = (tables.double().cpu() @ turn.T).float()
    by_coordinate = turned.transpose(1, 2).contiguous().numpy()
    norms = turned.square().sum(2).numpy()
    source = np.ascontiguousarray(vectors.detach().float().cpu().numpy())
    codes = np.empty((len(source), len(norms)), np.int64)
    _search(source, turn.float().contiguous().numpy(), by_coordinate, norms, width, get_num_threads(), codes)
    return torch.from_numpy(codes).to(vectors.device)


@njit(parallel=True)
def _search(vectors, turn, tables, norms, width, workers, codes):
    for worker in prange(workers):
        _search_part(vectors, turn, tables, norms, width, worker, workers, codes)


@njit
def _search_part(vectors, turn, tables, norms, width, worker, workers, codes):
    """Every `workers`-th vector."""
    num_tables, length, num_centroids = tables.shape
    scores = np.empty(num_centroids, np.float32)
    rest = np.empty((2, width, length), np.float32)
    begun = np.empty((2, width, num_tables), np.int64)
    cost = np.empty((2, width), np.float32)
    target = np.empty(length, np.float32)
    for n in range(worker, len(vectors), workers):
        for i in range(length):
            target[i] = 0
            for j in range(length):
                target[i] += turn[i, j] * vectors[n, j]
        rest[0, 0], cost[0, 0], kept, side = target, 0, 1, 0
        for t in range(num_tables):
            kept = _extend(
                t, kept, rest[side], cost[side], begun[side], tables[t], norms[t], scores, begun[1 - side], cost[1 - side]
            )
            side = 1 - side
            for b in range(kept):
                _lay_off(target, tables, begun[side, b], t + 1, -1, rest[side, b])
        best = begun[side, 0]
        _improve(target, tables, norms, best, scores, rest[1 - side, 0])
        codes[n] = best


@njit
def _extend(t, kept, rest, cost, begun, table, norm, scores, begun_next, cost_next):
    """The best beginnings with one code more, by ascending cost (less the target's own square), and how many there are."""
    width, filled = len(cost_next), 0
    for b in range(kept):
        _score(rest[b], table, norm, scores)
        for k in range(len(scores)):
            total = cost[b] + scores[k]
            if filled == width and not total < cost_next[width - 1]:
                continue
            place = filled if filled < width else width - 1
            while place > 0 and total < cost_next[place - 1]:
                cost_next[place] = cost_next[place - 1]
                begun_next[place] = begun_next[place - 1]
                place -= 1
            cost_next[place] = total
            begun_next[place, :t] = begun[b, :t]
            begun_next[place, t] = k
            filled = min(width, filled + 1)
    return filled


@njit
def _score(rest, table, norm, scores):
    """`|c|^2 - 2 rest.c` of every centroid."""
    for k in range(len(scores)):
        scores[k] = norm[k]
    for i in range(len(rest)):
        twice = np.float32(-2) * rest[i]
        for k in range(len(scores)):
            scores[k] += twice * table[i, k]


@njit
def _lay_off(target, tables, codes, count, without, rest):
    """The target less the centroids of the first `count` codes, one of them left out."""
    rest[:] = target
    for t in range(count):
        if t != without:
            for i in range(len(rest)):
                rest[i] -= tables[t, i, codes[t]]


@njit
def _improve(target, tables, norms, codes, scores, rest):
    """Each code given all others, round after round, until none changes."""
    changed = True
    while changed:
        changed = False
        for t in range(len(codes)):
            _lay_off(target, tables, codes, len(codes), t, rest)
            _score(rest, tables[t], norms[t], scores)
            best = codes[t]
            for k in range(len(scores)):
                if scores[k] < scores[best]:
                    best = k
            if best != codes[t]:
                codes[t], changed = best, True
