"""Bit-shift trellis codes against textbook loops, every walk of tiny trellises, and the definition of the shift register."""

import hashlib
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from scipy.special import ndtri

from mgvq.distortion import measured
from mgvq.trellis.code import STEPS, TrellisCode, trellis_code
from mgvq.trellis.coding import decode, encode
from mgvq.trellis.values import quantiles, state_values
from mgvq.trellis.viterbi import JOIN_MEMORY

KINDS = ("computed", "hybrid")
TINY = [(2, 1, 1, 8), (3, 1, 1, 8), (4, 1, 1, 8), (4, 1, 2, 8), (3, 2, 1, 4), (4, 2, 1, 5), (4, 3, 2, 3), (4, 3, 1, 3)]


def gaussian(n, length, seed=0):
    return torch.randn(n, length, generator=torch.Generator().manual_seed(seed))


def sized(state_bits, step_bits, step_weights, values="hybrid"):
    return TrellisCode(state_bits=state_bits, step_bits=step_bits, step_weights=step_weights, values=values)


def walk(new, code):
    """The states of a tail-biting walk, one shift after the other: the register starts with the last bits of the sequence."""
    register = 0
    for bits in new:
        register = (register << code.step_bits | bits) % 2**code.state_bits
    states = []
    for bits in new:
        register = (register << code.step_bits | bits) % 2**code.state_bits
        states.append(register)
    return states


def unpacked(codes, code, length):
    """The bits shifted in at every step, as integers."""
    steps = code.num_steps(length)
    rows = []
    for row in codes.tolist():
        number = int.from_bytes(bytes(row), "little")
        rows.append([number >> (t * code.step_bits) & (2**code.step_bits - 1) for t in range(steps)])
        assert number < 2 ** (steps * code.step_bits)
    return rows


def viterbi(targets, values, step_bits, overlap=None):
    """The textbook: one sequence "steps v", a table of predecessors, float32 sums in the order of the code under test."""
    num_states, branches = len(values), 2**step_bits
    origins = num_states // branches
    states = np.arange(num_states)
    before = states[None] // branches + origins * np.arange(branches)[:, None]  # the predecessors of every state
    errors = ((targets[:, None] - values[None]) ** 2).sum(2, dtype=np.float32)
    cost = errors[0].copy()
    if overlap is not None:
        cost[states // branches != overlap] = np.inf
    back = []
    for error in errors[1:]:
        choice = cost[before].argmin(0)
        back.append(before[choice, states])
        cost = cost[back[-1]] + error
    if overlap is not None:
        cost[states % origins != overlap] = np.inf
    path = [int(cost.argmin())]
    for step in reversed(back):
        path.append(int(step[path[-1]]))
    return path[::-1]


def reference(sequence, code):
    targets = sequence.numpy().reshape(-1, code.step_weights)
    values = state_values(code).numpy()
    reach = min(len(targets) // 2, JOIN_MEMORY * -(-code.state_bits // code.step_bits))
    around = np.take(targets, np.arange(-reach, reach), axis=0, mode="wrap")
    overlap = viterbi(around, values, code.step_bits)[reach] >> code.step_bits
    return [s % 2**code.step_bits for s in viterbi(targets, values, code.step_bits, overlap)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", STEPS)
@pytest.mark.parametrize(("state_bits", "length"), [(5, 10), (7, 64), (8, 258)])
def test_codes_are_those_of_the_textbook(kind, rate, state_bits, length):
    code = trellis_code(rate, state_bits, kind)
    targets = gaussian(5, length, state_bits)
    assert unpacked(encode(targets, code), code, length) == [reference(row, code) for row in targets]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", TINY)
def test_no_walk_of_the_same_overlap_is_better_and_none_is_missed_by_much(kind, sizes):
    *sizes, num_steps = sizes
    code = sized(*sizes, kind)
    length = num_steps * code.step_weights
    values = state_values(code).double().numpy()
    walks = [walk(new, code) for new in itertools.product(range(2**code.step_bits), repeat=num_steps)]
    every = values[np.array(walks)].reshape(len(walks), length)
    overlaps = np.array([states[0] >> code.step_bits for states in walks])
    targets = gaussian(40, length)
    reached = (decode(encode(targets, code), code, length) - targets).double().square().sum(1).numpy()
    chosen = [walk(new, code)[0] >> code.step_bits for new in unpacked(encode(targets, code), code, length)]
    errors = ((targets.double().numpy()[:, None] - every[None]) ** 2).sum(2)
    best_of_overlap = np.array([row[overlaps == own].min() for row, own in zip(errors, chosen, strict=True)])
    assert reached == pytest.approx(best_of_overlap, rel=1e-5)
    assert (reached >= errors.min(1) * (1 - 1e-5)).all()
    assert reached.mean() < 1.3 * errors.min(1).mean()  # the overlap is a good one, though not always the best


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", STEPS)
@pytest.mark.parametrize("length", [24, 26, 256])
def test_decoding_is_the_shift_register(kind, rate, length):
    code = trellis_code(rate, 9, kind)
    rows = torch.randint(256, (3, code.num_bytes(length)), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    filled = -code.num_steps(length) * code.step_bits % 8
    rows[:, -1] &= 255 >> filled
    values = state_values(code)
    expected = torch.stack([values[walk(new, code)].flatten() for new in unpacked(rows, code, length)])
    assert torch.equal(decode(rows, code, length), expected)


@pytest.mark.parametrize("rate", STEPS)
def test_what_was_decoded_is_encoded_without_error(rate):
    code = trellis_code(rate, 10)
    rows = torch.randint(256, (33, code.num_bytes(128)), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    values = decode(rows, code, 128)
    assert torch.equal(decode(encode(values, code), code, 128), values)


@pytest.mark.parametrize(
    ("rate", "length", "expected"), [(2.0, 256, 64), (0.5, 256, 16), (1.5, 256, 48), (3.0, 10, 4), (4.0, 7, 4)]
)
def test_a_sequence_costs_its_rate_exactly(rate, length, expected):
    code = trellis_code(rate, 5)
    assert encode(gaussian(2, length), code).shape == (2, expected)
    assert expected == -(-rate * length // 8)


def test_neither_threads_nor_neighbours_change_a_code():
    code, targets, threads = trellis_code(2.0, 8), gaussian(70, 64), numba.get_num_threads()
    expected = encode(targets, code)
    try:
        for count in range(1, min(3, numba.config.NUMBA_NUM_THREADS) + 1):
            numba.set_num_threads(count)
            assert torch.equal(encode(targets, code), expected)
    finally:
        numba.set_num_threads(threads)
    assert torch.equal(torch.cat([encode(row[None], code) for row in targets]), expected)
    assert encode(targets[:0], code).shape == (0, 16)


def test_targets_are_left_as_they_were_and_may_be_strided():
    code, targets = trellis_code(2.0, 6), gaussian(64, 8)
    before = targets.clone()
    assert torch.equal(encode(targets.T, code), encode(targets.T.contiguous(), code))
    assert torch.equal(targets, before)


@pytest.mark.parametrize("state_bits", [4, 8, 12, 16])
@pytest.mark.parametrize("rate", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_have_mean_0_and_variance_1(state_bits, rate, kind):
    if STEPS[rate][0] < state_bits:
        values = state_values(trellis_code(rate, state_bits, kind)).double()
        assert values.mean(0).abs().max() < 1e-6
        assert values.square().mean(0) == pytest.approx(1, abs=1e-3)


def test_computed_values_are_the_sums_of_the_bytes():
    code = trellis_code(2.0, 10, "computed")
    sums = torch.tensor([sum(((34038481 * s + 76625530) % 2**32).to_bytes(4, "little")) for s in range(1024)]).double()
    expected = (sums - sums.mean()) / sums.std(correction=0)
    assert torch.allclose(state_values(code)[:, 0].double(), expected, atol=1e-6)


@pytest.mark.parametrize("step_bits", [1, 2, 3, 4])
@pytest.mark.parametrize("step_weights", [1, 2])
def test_hybrid_branches_take_one_value_in_each_share_of_all(step_bits, step_weights):
    values = state_values(sized(10, step_bits, step_weights)).numpy()
    branches, origins = 2**step_bits, 2 ** (10 - step_bits)
    for weight in range(step_weights):
        ranks = values[:, weight].argsort().argsort()
        assert sorted(ranks) == list(range(1024))
        leaving = np.sort(ranks.reshape(origins, branches))
        assert (leaving // origins == np.arange(branches)).all()
        assert (np.diff(leaving) == origins).all()


def test_quantiles_are_rounded_where_no_machine_can_disagree():
    exact = ndtri((np.arange(1024) + 0.5) / 1024)
    places = exact / np.sqrt(np.mean(exact**2)) * 4096 % 1
    assert np.abs(places - 0.5).min() > 1e-9
    assert np.abs(quantiles(10) + quantiles(10)[::-1]).max() == 0


def test_values_are_the_same_on_every_machine():
    digest = hashlib.sha256()
    for kind, rate, state_bits in itertools.product(KINDS, STEPS, (8, 13)):
        digest.update(state_values(trellis_code(rate, state_bits, kind)).numpy().astype("<f4").tobytes())
    assert digest.hexdigest()[:16] == "be84f68ef21cf20f"


@pytest.mark.parametrize("code", ["trellis_hybrid_8", "trellis_computed_8", "trellis_hybrid_10"])
@pytest.mark.parametrize("rate", STEPS)
def test_the_measured_distortion_is_met(code, rate):
    _, kind, state_bits = code.split("_")
    entry, trellis = measured(code, rate), trellis_code(rate, int(state_bits), kind)
    targets, scale = gaussian(160, 256, 9), entry.scales[0]
    reached = (decode(encode(targets / scale, trellis), trellis, 256) * scale - targets).square().mean()
    assert reached == pytest.approx(entry.distortion, rel=0.04)


@pytest.mark.parametrize("rate", STEPS)
def test_more_states_and_better_values_come_nearer_to_the_limit(rate):
    for kind in KINDS:
        line = [measured(f"trellis_{kind}_{bits}", rate).distortion for bits in (8, 10, 12, 14)]
        assert sorted(line, reverse=True) == line
        assert line[-1] > 4**-rate
    for bits in (8, 10, 12, 14):
        assert measured(f"trellis_hybrid_{bits}", rate).distortion < measured(f"trellis_computed_{bits}", rate).distortion


def test_what_cannot_be_coded_is_refused():
    code = trellis_code(1.5, 8)
    with pytest.raises(ValueError, match="finite"):
        encode(torch.full((1, 16), torch.nan), code)
    for length in (17, 4):
        with pytest.raises(ValueError, match="multiple of 2 weights, 6 at least"):
            encode(torch.zeros(1, length), code)
    with pytest.raises(ValueError, match="take 3 bytes, found 4"):
        decode(torch.zeros(1, 4, dtype=torch.uint8), code, 16)
    with pytest.raises(ValueError, match=r"not 2\.5"):
        trellis_code(2.5, 8)
    for wrong in ({"state_bits": 3}, {"state_bits": 17}, {"step_bits": 5}, {"step_weights": 3}):
        with pytest.raises(ValueError, match=r"must|has"):
            replace(code, **wrong)


PROGRAM = """
from mgvq.compiled import CACHED, FOLDER, njit

@njit
def increment(x):
    return x + 1

print(increment(1), CACHED, FOLDER)
"""


def run_with(program, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        check=True,
        env={**kept, "PYTHONPATH": root, **environment},
    )
    return done.stdout.split()


def test_compiled_loops_are_kept_in_the_users_folder_or_nowhere(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    folder = tmp_path / ".cache" / "mgvq" / "numba"
    assert run_with(program, HOME=str(tmp_path)) == ["2", "True", str(folder)]
    assert list(folder.rglob("*.nbi"))
    assert not list(tmp_path.glob("__pycache__"))
    assert run_with(program, HOME="/proc/none") == ["2", "False", "/proc/none/.cache/mgvq/numba"]


@pytest.mark.parametrize(
    ("code", "bits", "published"),
    [
        *(("trellis_computed_12", bits, mse) for bits, mse in ((1.0, 0.2803), (2.0, 0.0733), (3.0, 0.0198), (4.0, 0.0055))),
        ("trellis_hybrid_14", 2.0, 0.071),
        ("lloyd_max", 2.0, 0.118),
    ],
)
def test_no_more_is_left_of_a_gaussian_than_published(code, bits, published):
    """QTIP (arXiv 2406.11235), Table 2: 4,096 states, tail-biting; Table 1: HYB, of 65,536 states, and Lloyd-Max."""
    assert measured(code, bits).distortion <= 1.02 * published
