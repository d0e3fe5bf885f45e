"""The walk of least squared error through a bit-shift trellis that ends where it began (Viterbi, tail-biting), compiled.

Many sequences (lanes) go side by side: arrays of costs are "states lanes" with the lanes last, so that the loops over them are
vector instructions. Sums are rounded one by one in float32 and ties go to the lower state, whatever the machine or the number
of threads.
"""

import numpy as np
from numpy.typing import NDArray

from mgvq.compiled import get_num_threads, njit, prange

LANES = 32
JOIN_MEMORY = 8  # constraint lengths on each side of the join; past that survivors have merged, and more changes nothing


def tail_biting(targets: NDArray[np.float32], values: NDArray[np.float32], step_bits: int) -> NDArray[np.uint8]:
    """The bits shifted in at every step, "n steps", of targets "n steps v", states' values "states v".

    Two searches (QTIP, Tseng et al. 2024): a free one around the join of the sequence's end and beginning, whose
    state there gives the overlap, the L - B bits that first and last state share; then one of the whole sequence under this
    constraint. The walk is the best of those with that overlap. Needs L > B and at least L / B steps; finite targets.
    """
    num_states = len(values)
    memory = -(-(num_states.bit_length() - 1) // step_bits)
    reach = min(targets.shape[1] // 2, JOIN_MEMORY * memory)
    by_origin = np.ascontiguousarray(values.T).reshape(values.shape[1], num_states >> step_bits, 1 << step_bits)
    codes = np.empty(targets.shape[:2], np.uint8)
    _encode(targets, by_origin, reach, get_num_threads(), codes)
    return codes


@njit(parallel=True)
def _encode(targets, values, reach, workers, codes):
    for worker in prange(workers):
        _encode_part(targets, values, reach, worker, workers, codes)


@njit
def _encode_part(targets, values, reach, worker, workers, codes):
    """Every `workers`-th group of sequences."""
    num_sequences, num_steps, num_values = targets.shape
    _, num_origins, num_branches = values.shape
    cost = np.empty(num_origins * num_branches * LANES, np.float32)
    best = np.empty(num_origins * LANES, np.float32)
    back = np.empty((num_steps, num_origins * LANES), np.uint8)
    side_by_side = np.empty((num_steps, num_values, LANES), np.float32)
    state = np.empty((num_steps, LANES), np.int64)
    overlap = np.empty(LANES, np.int64)
    for first in range(worker * LANES, num_sequences, workers * LANES):
        lanes = min(LANES, num_sequences - first)
        for start, count in ((-reach, 2 * reach), (0, num_steps)):
            for lane in range(LANES):
                overlap[lane] = -1 if start else state[reach, lane] // num_branches
                _load(targets, first + min(lane, lanes - 1), start, count, side_by_side, lane)  # the last repeats
            _search(side_by_side[:count], values, overlap, cost, best, back, state)
        for lane in range(lanes):
            for t in range(num_steps):
                codes[first + lane, t] = state[t, lane] % num_branches


@njit
def _load(targets, sequence, start, count, side_by_side, lane):
    """`count` steps of a sequence from `start` on, around its end where that is passed."""
    for t in range(count):
        for i in range(targets.shape[2]):
            side_by_side[t, i, lane] = targets[sequence, (start + t) % targets.shape[1], i]


@njit
def _search(targets, values, overlap, cost, best, back, state):
    """The states of the best walk into `state`, "steps lanes"; an overlap < 0 binds nothing. The rest is working memory.

    A state is `origin * P + branch`: an origin is the L - B bits that stay, a branch one of the P = 2^B values shifted in. It is
    `digit * Q + origin'` as well, origin' that of its successors, digit the bits that they lose.
    """
    num_steps, lanes = len(targets), len(overlap)
    num_origins, num_branches = values.shape[1:]
    best_of, cost_of = best.reshape(num_origins, lanes), cost.reshape(num_origins, num_branches, lanes)
    for origin in range(num_origins):
        for lane in range(lanes):
            allowed = overlap[lane] < 0 or overlap[lane] == origin
            best_of[origin, lane] = np.float32(0) if allowed else np.float32(np.inf)
    _extend(best_of, targets[0], values, cost_of)
    for t in range(1, num_steps):
        _select(cost.reshape(num_branches, -1), best, back[t])
        _extend(best_of, targets[t], values, cost_of)
    final = cost.reshape(-1, lanes)
    for lane in range(lanes):
        step = 1 if overlap[lane] < 0 else num_origins
        last = max(0, overlap[lane])
        for s in range(last, len(final), step):
            if final[s, lane] < final[last, lane]:
                last = s
        state[num_steps - 1, lane] = last
        for t in range(num_steps - 1, 0, -1):
            origin = state[t, lane] // num_branches
            state[t - 1, lane] = back[t, origin * lanes + lane] * num_origins + origin


@njit
def _select(cost, best, back):
    """The cheapest of the P states that lead to each origin, and which of them."""
    if len(cost) == 2:
        _select_of((0, 1), cost, best, back)
    elif len(cost) == 4:
        _select_of((0, 1, 2, 3), cost, best, back)
    elif len(cost) == 8:
        _select_of((0, 1, 2, 3, 4, 5, 6, 7), cost, best, back)
    else:
        _select_of((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), cost, best, back)


@njit
def _select_of(digits, cost, best, back):
    """The length of a tuple is part of its type, so that the inner loop is unrolled and the outer one becomes vectors."""
    for i in range(cost.shape[1]):
        least, digit = cost[0, i], np.int32(0)
        for j in range(1, len(digits)):
            c = cost[j, i]
            digit = np.int32(j) if c < least else digit
            least = c if c < least else least
        best[i] = least
        back[i] = np.uint8(digit)


@njit
def _extend(best, target, values, cost):
    """The cost of every state: that of its origin and the squared error of its values."""
    for origin in range(len(best)):
        for branch in range(values.shape[2]):
            before, after = best[origin], cost[origin, branch]
            if len(values) == 1:
                x, v = target[0], values[0, origin, branch]
                for lane in range(len(x)):
                    d = x[lane] - v
                    after[lane] = before[lane] + d * d
            else:
                x, v, y, w = target[0], values[0, origin, branch], target[1], values[1, origin, branch]
                for lane in range(len(x)):
                    d, e = x[lane] - v, y[lane] - w
                    after[lane] = before[lane] + (d * d + e * e)
