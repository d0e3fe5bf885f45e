"""Beam search and coordinate descent against searches through all codes."""

import itertools

import numba
import pytest
import torch

from mgvq.codebook.additive import Additive
from mgvq.codebook.beam import beam_search
from mgvq.compensation.coordinate_descent import CoordinateDescent
from mgvq.compensation.hessian import Hessian
from mgvq.errors import UserError
from mgvq.linalg import damped
from mgvq.protocols import FittedSlice
from mgvq.types import ChannelSlice, Metric, Site


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cost(vector, tables, codes, root):
    rest = root.double() @ (vector.double() - sum(table[c].double() for table, c in zip(tables, codes, strict=True)))
    return float(rest @ rest)


def slow_beam(vector, tables, root, width):
    """As AQLM has it: all extensions of the kept beginnings, the best of them kept; then code by code until nothing changes."""
    kept = [()]
    for t, table in enumerate(tables):
        tries = [(*codes, k) for codes in kept for k in range(len(table))]
        kept = sorted(tries, key=lambda codes: cost(vector, tables[: t + 1], codes, root))[:width]
    best, changed = list(kept[0]), True
    while changed:
        changed = False
        for t in range(len(tables)):
            tries = [[*best[:t], k, *best[t + 1 :]] for k in range(len(tables[t]))]
            better = min(tries, key=lambda codes: cost(vector, tables, codes, root))
            if cost(vector, tables, better, root) < cost(vector, tables, best, root) * (1 - 1e-6):
                best, changed = better, True
    return best


@pytest.mark.parametrize(("num_tables", "width"), [(2, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("rooted", [False, True])
def test_the_codes_are_those_of_a_slow_search(num_tables, width, rooted):
    vectors, tables = normal(40, 4), normal(num_tables, 6, 4, seed=1) * 0.7
    root = normal(4, 4, seed=2).triu() if rooted else torch.eye(4)
    found = beam_search(vectors, tables, root if rooted else None, width)
    assert found.tolist() == [slow_beam(vector, tables, root, width) for vector in vectors]


def test_a_beam_of_all_codes_is_exact():
    vectors, tables, root = normal(40, 4), normal(2, 6, 4, seed=1), normal(4, 4, seed=2).triu()
    every = list(itertools.product(range(6), repeat=2))
    found = beam_search(vectors, tables, root, 36)
    for vector, codes in zip(vectors, found.tolist(), strict=True):
        assert cost(vector, tables, codes, root) == pytest.approx(min(cost(vector, tables, c, root) for c in every), rel=1e-5)


def test_threads_and_company_change_no_code():
    vectors, tables, threads = normal(33, 4), normal(2, 6, 4, seed=1), numba.get_num_threads()
    expected = beam_search(vectors, tables, None, 3)
    try:
        for count in range(1, min(3, numba.config.NUMBA_NUM_THREADS) + 1):
            numba.set_num_threads(count)
            assert torch.equal(beam_search(vectors, tables, None, 3), expected)
    finally:
        numba.set_num_threads(threads)
    assert torch.equal(torch.cat([beam_search(v[None], tables, None, 3) for v in vectors]), expected)
    with pytest.raises(ValueError, match="1 wide"):
        beam_search(vectors, tables, None, 0)


def test_a_wider_beam_loses_less_and_two_tables_beat_none():
    settings = {"share": "layer", "table": "fp16", "weight_power": 0.0, "iterations": 10, "sample": 64, "seed": 0}
    weight, errors = normal(64, 64), []
    for beam in (1, 8):
        codebook = Additive(vector_length=4, num_tables=2, beam=beam, **settings)
        rate = next(r for r in codebook.rates() if r.name == "4x16+16")
        (fitted,) = codebook.fit("unit", [weight], rate, [None], [])
        errors.append(float((fitted.encode(weight.unflatten(1, (-1, 4)), 0, None)[1].flatten(1) - weight).square().mean()))
    assert errors[1] < errors[0] < 0.2
    for bad in ({"num_tables": 1, "beam": 8}, {"num_tables": 2, "beam": 0}):
        with pytest.raises(UserError, match="whole number"):
            Additive(vector_length=4, **bad, **settings)


def descent(sweeps, damping=0.01):
    return CoordinateDescent(damping=damping, sweeps=sweeps)


def two_slices(codebook_of, shape=(10, 24)):
    weight, tokens = normal(*shape), normal(200, shape[1], seed=3) @ normal(shape[1], shape[1], seed=4)
    site, slices = Site("layer", "language", "layer", None, *shape), []
    for group in range(2):
        part = ChannelSlice(site, group, torch.arange(group, shape[1], 2))
        slices.append(FittedSlice(part, codebook_of(weight[:, part.columns])))
    return weight, Metric((tokens.T @ tokens / 200,)), slices


def objective(weight, metric, slices, codes):
    value = torch.empty_like(weight)
    for fitted, own in zip(slices, codes, strict=True):
        value[:, fitted.channel_slice.columns] = fitted.codebook.weight(own).decode()
    error = (weight - value).double()
    return float(((error @ damped(metric.h_in[0], 0.01)) * error).sum())


def additive(weight):
    settings = {"share": "layer", "table": "fp16", "weight_power": 0.0, "iterations": 10, "sample": 64, "seed": 0}
    codebook = Additive(vector_length=4, num_tables=2, beam=4, **settings)
    return codebook.fit("unit", [weight], next(r for r in codebook.rates() if r.name == "4x4+4"), [None], [])[0]


def test_every_sweep_lowers_the_objective_until_no_single_vector_can():
    weight, metric, slices = two_slices(additive)
    score = normal(24).abs()
    start = Hessian(damping=0.01).round(weight, metric, slices, score, [])
    losses = [
        objective(weight, metric, slices, c)
        for c in (start, *(descent(n).round(weight, metric, slices, score, []) for n in (1, 2, 30)))
    ]
    assert losses[0] > losses[1] >= losses[2] >= losses[3]
    codes = descent(30).round(weight, metric, slices, score, [])
    every = list(itertools.product(range(4), repeat=2))
    for p, v, row in itertools.product(range(2), range(3), range(0, 10, 3)):
        for pair in every:
            moved = [c.clone() for c in codes]
            moved[p][row, v] = torch.tensor(pair, dtype=moved[p].dtype)
            assert objective(weight, metric, slices, moved) >= losses[3] * (1 - 1e-5)


def test_sweeps_are_counted():
    with pytest.raises(UserError, match="sweeps"):
        descent(0)
