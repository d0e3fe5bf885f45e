"""The walk of least squared error through a bit-shift trellis that ends where it began (Viterbi, tail-biting), compiled.

Many sequences (lanes) go side by side: arrays of costs have the lanes last, so that the loops over them are vector instructions.
Only the costs of origins are kept, a fraction of the states, since a state's own cost is made where it is compared: they stay in
the processor's nearest memory. Sums are rounded one by one in float32 and ties go to the lower state, whatever the machine, the
number of threads or that of lanes.
"""

import numpy as np
from numpy.typing import NDArray

from mgvq.compiled import get_num_threads, njit, prange

MAX_LANES = 32
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
    by_digit = np.ascontiguousarray(values.T).reshape(values.shape[1], 1 << step_bits, num_states >> step_bits)
    codes = np.empty(targets.shape[:2], np.uint8)
    workers = get_num_threads()
    _encode(targets, by_digit, reach, workers, _num_lanes(len(targets), workers), codes)
    return codes


def _num_lanes(num_sequences: int, workers: int) -> int:
    """How many sequences go side by side: as many groups for every worker, and no more empty lanes than vectors ask for."""
    share = max(1, -(-num_sequences // workers))
    groups = -(-share // MAX_LANES)
    return -(-share // (8 * groups)) * 8


@njit(parallel=True)
def _encode(targets, values, reach, workers, lanes, codes):
    for worker in prange(workers):
        _encode_part(targets, values, reach, worker, workers, lanes, codes)


@njit
def _encode_part(targets, values, reach, worker, workers, lanes, codes):
    """Every `workers`-th group of sequences."""
    num_sequences, num_steps, num_values = targets.shape
    _, num_branches, num_origins = values.shape
    costs = np.empty((2, num_origins, lanes), np.float32)
    back = np.empty((num_steps, num_origins, lanes), np.uint8)
    side_by_side = np.empty((num_steps, num_values, lanes), np.float32)
    state = np.empty((num_steps, lanes), np.int64)
    overlap = np.empty(lanes, np.int64)
    for first in range(worker * lanes, num_sequences, workers * lanes):
        taken = min(lanes, num_sequences - first)
        for start, count in ((-reach, 2 * reach), (0, num_steps)):
            for lane in range(lanes):
                overlap[lane] = -1 if start else state[reach, lane] // num_branches
                _load(targets, first + min(lane, taken - 1), start, count, side_by_side, lane)  # the last repeats
            _search(side_by_side[:count], values, overlap, costs, back, state)
        for lane in range(taken):
            for t in range(num_steps):
                codes[first + lane, t] = state[t, lane] % num_branches


@njit
def _load(targets, sequence, start, count, side_by_side, lane):
    """`count` steps of a sequence from `start` on, around its end where that is passed."""
    for t in range(count):
        for i in range(targets.shape[2]):
            side_by_side[t, i, lane] = targets[sequence, (start + t) % targets.shape[1], i]


@njit
def _search(targets, values, overlap, costs, back, state):
    """The states of the best walk into `state`, "steps lanes"; an overlap < 0 binds nothing. The rest is working memory.

    A state is `origin * P + branch`: an origin is the L - B bits that stay, a branch one of the P = 2^B values shifted in. It is
    `digit * Q + origin'` as well, origin' that of its successors, digit the bits that they lose. `costs` are the least ones of
    the walks up to an origin, before its state's own error.
    """
    num_steps, lanes = len(targets), len(overlap)
    num_branches, num_origins = values.shape[1:]
    for origin in range(num_origins):
        for lane in range(lanes):
            allowed = overlap[lane] < 0 or overlap[lane] == origin
            costs[0, origin, lane] = np.float32(0) if allowed else np.float32(np.inf)
    for t in range(1, num_steps):
        _step(costs[(t - 1) % 2], targets[t - 1], values, costs[t % 2], back[t])
    cost, target = costs[(num_steps - 1) % 2], targets[num_steps - 1]
    for lane in range(lanes):
        least, last = np.float32(np.inf), max(0, overlap[lane])
        for s in range(last, num_branches * num_origins, 1 if overlap[lane] < 0 else num_origins):
            c = cost[s // num_branches, lane] + _error(target, values, s // num_origins, s % num_origins, lane)
            if c < least:
                least, last = c, s
        state[num_steps - 1, lane] = last
        for t in range(num_steps - 1, 0, -1):
            origin = state[t, lane] // num_branches
            state[t - 1, lane] = back[t, origin, lane] * num_origins + origin


@njit
def _step(before, target, values, after, back):
    """The least cost of the P states that lead to each origin, and which of them."""
    num_branches = values.shape[1]
    if num_branches == 2:
        _step_of((0, 1), before, target, values, after, back)
    elif num_branches == 4:
        _step_of((0, 1, 2, 3), before, target, values, after, back)
    elif num_branches == 8:
        _step_of((0, 1, 2, 3, 4, 5, 6, 7), before, target, values, after, back)
    else:
        _step_of((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), before, target, values, after, back)


@njit
def _step_of(digits, before, target, values, after, back):
    """The length of a tuple is part of its type, so that the inner loop is unrolled and the outer one becomes vectors."""
    num_origins, lanes = after.shape
    for o in range(num_origins):
        for lane in range(lanes):
            least, digit = before[o // len(digits), lane] + _error(target, values, 0, o, lane), np.int32(0)
            for j in range(1, len(digits)):
                c = before[(j * num_origins + o) // len(digits), lane] + _error(target, values, j, o, lane)
                digit = np.int32(j) if c < least else digit
                least = c if c < least else least
            after[o, lane] = least
            back[o, lane] = np.uint8(digit)


@njit
def _error(target, values, digit, origin, lane):
    """The squared error of a state's values."""
    d = target[0, lane] - values[0, digit, origin]
    if len(values) == 1:
        return d * d
    e = target[1, lane] - values[1, digit, origin]
    return d * d + e * e
