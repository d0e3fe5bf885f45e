"""Allocations against all choices there are, against closed forms, and against the rule they were learned from."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

from mgvq.allocation.budget import hull
from mgvq.allocation.exact import Exact
from mgvq.allocation.greedy import Greedy
from mgvq.allocation.ratio import Ratio
from mgvq.allocation.threshold import Threshold
from mgvq.allocation.transfer import Transfer
from mgvq.allocation.uniform import Uniform
from mgvq.allocation.water_filling import WaterFilling
from mgvq.types import Rate, RateTable, TableGroupInfo

OFF = dict(min_bits=None, min_bits_kv=None)
EXACT = Exact(distortion="measured", gap=0.0, time_limit=60.0, **OFF)
GREEDY = Greedy(distortion="measured", **OFF)
WATER = WaterFilling(**OFF)
RATIO = Ratio(within="model", **OFF)


def table_group(u, num_weights, score, tower="language", kind="q_proj", block=0, depth=0.5, quantile=0.5):
    return TableGroupInfo(f"u{u}", tower, kind, block, depth, 0, num_weights, score, quantile)


def modelled(table_groups, offered, tables=None):
    """The Gaussian model at exactly `num_weights * index_bits` (rounded up) bits and, for each rate, a table."""
    rates = [Rate(f"r{b:g}", float(b)) for b in offered]
    tables = tables or [0] * len(rates)
    bits = [[math.ceil(u.num_weights * r.index_bits) + t for r, t in zip(rates, tables, strict=True)] for u in table_groups]
    loss = [[u.score * 4**-r.index_bits for r in rates] for u in table_groups]
    return RateTable(table_groups, rates, torch.tensor(bits), torch.tensor(loss, dtype=torch.float64))


def noisy(table_groups, rates, seed, convex=False):
    """Table groups of very unequal size; losses that need not fall with the rate, or (convex) the Gaussian model."""
    draws = torch.Generator().manual_seed(seed)
    sizes = (10 ** (1 + 3 * torch.rand(table_groups, generator=draws))).long().tolist()
    scores = (torch.randn(table_groups, generator=draws, dtype=torch.float64).exp() * torch.tensor(sizes)).tolist()
    table = modelled(
        [table_group(u, n, s) for u, (n, s) in enumerate(zip(sizes, scores, strict=True))], [0.75, 1, 1.5, 2, 3][:rates]
    )
    if convex:
        return table
    tables = torch.tensor([0, 32, 128, 512, 4096])[:rates]  # these cost a small table group more than its codes
    noise = torch.rand(table_groups, rates, generator=draws, dtype=torch.float64) + 0.5
    return RateTable(table.table_groups, table.rates, table.bits + tables, table.loss * noise)


def everything(table):
    """Bits and loss of every choice there is."""
    bits, loss = np.zeros(1), np.zeros(1)
    for b, d in zip(table.bits.numpy(), table.loss.numpy(), strict=True):
        bits, loss = (bits[:, None] + b).ravel(), (loss[:, None] + d).ravel()
    return bits, loss


def total(values, choice):
    return values.gather(1, choice[:, None]).sum().item()


def some_budgets(table, count):
    least, most = table.bits.amin(1).sum().item(), table.bits.amax(1).sum().item()
    return [least + (most - least) * i // count for i in range(count)]


@pytest.mark.parametrize(("table_groups", "rates", "seed"), [(1, 5, 0), (5, 5, 1), (6, 4, 2), (7, 3, 3), (8, 5, 4)])
def test_exact_is_the_best_of_all_choices(table_groups, rates, seed):
    table = noisy(table_groups, rates, seed)
    bits, loss = everything(table)
    for budget in some_budgets(table, 8):
        choice = EXACT(table, budget)
        assert total(table.bits, choice) <= budget
        assert total(table.loss, choice) == pytest.approx(loss[bits <= budget].min(), rel=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_exact_does_not_depend_on_the_scale_of_the_losses(scale):
    table = noisy(8, 5, 5)
    scaled = RateTable(table.table_groups, table.rates, table.bits, table.loss * scale)
    for budget in some_budgets(table, 5):
        assert torch.equal(EXACT(scaled, budget), EXACT(table, budget))


def test_exact_at_the_size_of_a_large_model_keeps_the_budget_to_the_bit():
    small = noisy(60, 5, 6)
    table = RateTable(small.table_groups, small.rates, small.bits * 40961 + 1, small.loss)  # a shared divisor would be too easy
    for budget in some_budgets(table, 4):
        choice = Exact(distortion="measured", gap=1e-4, time_limit=60.0, **OFF)(table, budget)
        assert total(table.bits, choice) <= budget
        assert total(table.loss, choice) <= total(table.loss, GREEDY(table, budget)) * (1 + 1e-4)


def test_more_budget_never_raises_the_least_loss():
    table = noisy(8, 5, 7)
    losses = [total(table.loss, EXACT(table, budget)) for budget in some_budgets(table, 25)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("seed", range(6))
def test_the_hull_is_that_of_all_mixtures(seed):
    """A rate is on the hull if no mixture of two others saves as much for as few bits."""
    table = noisy(1, 5, seed)
    bits, loss, legal = table.bits[0].tolist(), table.loss[0].tolist(), [True, True, seed % 2 == 0, True, True]
    offered = [r for r in range(5) if legal[r]]
    cheapest = min(bits[r] for r in offered)
    expected = []
    for r in offered:
        pairs = [(a, b) for a in offered for b in offered if r not in (a, b) and bits[a] <= bits[r]]
        mixtures = [loss[a] for a, _ in pairs]
        mixtures += [
            loss[a] + (loss[b] - loss[a]) * (bits[r] - bits[a]) / (bits[b] - bits[a]) for a, b in pairs if bits[b] > bits[r]
        ]
        if bits[r] == cheapest or loss[r] < min(mixtures):
            expected.append(r)
    assert hull(bits, loss, legal) == sorted(expected, key=lambda r: bits[r])


@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_optimal_where_an_upgrade_ends_and_near_elsewhere(seed):
    """Elsewhere: no worse than the best choice by more than the dearest upgrade that was left out."""
    table = noisy(7, 4, seed, convex=True)
    bits, loss = everything(table)
    steps = sorted(
        ((d[r] - d[r + 1]) / (b[r + 1] - b[r]), b[r + 1] - b[r])
        for b, d in zip(table.bits.tolist(), table.loss.tolist(), strict=True)
        for r in range(3)
    )[::-1]
    spent = list(itertools.accumulate((extra for _, extra in steps), initial=table.bits[:, 0].sum().item()))
    for budget in spent:
        choice = GREEDY(table, budget)
        assert total(table.bits, choice) == budget
        assert total(table.loss, choice) == pytest.approx(loss[bits <= budget].min(), rel=1e-9)
    for (slope, extra), low, high in zip(steps, spent, spent[1:], strict=False):
        budget = (low + high) // 2
        gap = total(table.loss, GREEDY(table, budget)) - loss[bits <= budget].min()
        assert -1e-9 <= gap <= slope * extra


@pytest.mark.parametrize("seed", range(5))
def test_greedy_on_noisy_tables_is_near_the_best_of_all_choices(seed):
    table = noisy(8, 5, seed)
    bits, loss = everything(table)
    worst = []
    for budget in some_budgets(table, 12):
        best = loss[bits <= budget].min()
        choice = GREEDY(table, budget)
        hulls = [hull(b, d, [True] * 5) for b, d in zip(table.bits.tolist(), table.loss.tolist(), strict=True)]
        upgrades = [table.loss[u, a] - table.loss[u, b] for u, rungs in enumerate(hulls) for a, b in itertools.pairwise(rungs)]
        worst.append(total(table.loss, choice) / best)
        assert best * (1 - 1e-9) <= total(table.loss, choice) <= best + max(upgrades).item()
    assert np.median(worst) < 1.05


def hand_made(bits, loss):
    """One table group of 10 weights."""
    rates = [Rate(f"r{i}", 1.0 + i) for i in range(len(bits))]
    return RateTable([table_group(0, 10, 1.0)], rates, torch.tensor([bits]), torch.tensor([loss], dtype=torch.float64))


def test_what_the_hull_leaves_out_is_taken_where_nothing_else_fits():
    table = hand_made(bits=[10, 20, 30], loss=[10.0, 9.0, 0.0])
    assert [GREEDY(table, budget).item() for budget in (10, 19, 20, 29, 30)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("policy", [WATER, RATIO], ids=["water_filling", "ratio"])
def test_no_upgrade_is_skipped_for_a_cheaper_one_behind_it(policy):
    table = hand_made(bits=[10, 100, 110], loss=[0.0] * 3)
    assert [policy(table, budget).item() for budget in (10, 50, 99, 100, 109, 110)] == [0, 0, 0, 1, 1, 2]


def log_normal(count, seed, spread=1.5, sizes=None):
    """Table groups of log-normal scores a weight, of wide spread; 64 weights each, so that steps of 1/64 bit cost one bit."""
    scores = np.exp(spread * np.random.default_rng(seed).standard_normal(count))
    sizes = [64] * count if sizes is None else sizes
    return [table_group(u, n, float(n * s)) for u, (n, s) in enumerate(zip(sizes, scores, strict=True))]


@pytest.mark.parametrize("bits_per_weight", [1.0, 3.0, 6.0])
def test_water_filling_meets_the_conditions_of_the_continuous_optimum(bits_per_weight):
    """On a fine grid: marginal losses a bit are equal, smaller at the floor, larger at the ceiling."""
    draws = np.random.default_rng(0)
    table_groups = log_normal(60, 1, spread=3.0, sizes=(1024 * draws.integers(1, 50, 60)).tolist())
    step = 1 / 32
    table = modelled(table_groups, np.arange(0.5, 7 + step, step))
    weights = sum(u.num_weights for u in table_groups)
    choice = WATER(table, int(bits_per_weight * weights))
    b = np.array([table.rates[r].index_bits for r in choice])
    n, s = (np.array([getattr(u, field) for u in table_groups]) for field in ("num_weights", "score"))
    marginal = np.log2(s / n) - 2 * b  # log2 of what another bit for every weight saves, a bit
    free = (b > 0.5) & (b < 7)
    assert 10 < free.sum() < 60
    level = marginal[free].mean()
    assert np.abs(marginal[free] - level).max() <= 3 * step  # half a step of rounding, one that did not fit
    assert (marginal[b == 0.5] <= level + 3 * step).all()
    assert (marginal[b == 7] >= level - 3 * step).all()
    assert bits_per_weight * weights - (n * b).sum() < n.max() * step


def test_the_figures_of_the_toy():
    """Method 2.1: 50.9 for uniform bits, 21.5 for the ratio rule, 14.1 for water-filling; a spread of 1.6 fits them."""
    against_uniform = []
    for seed in range(4):
        table = modelled(log_normal(256, seed, spread=1.6), np.arange(0, 8, 1 / 8))
        losses = [
            total(table.loss, policy(table, 2 * 64 * 256)) for policy in (Uniform(tolerance=0.0, spread=False), RATIO, WATER)
        ]
        assert losses[2] < losses[1] < losses[0]
        against_uniform.append([loss / losses[0] for loss in losses])
    ratio, water = np.mean(against_uniform, 0)[1:]
    assert ratio == pytest.approx(21.5 / 50.9, abs=0.06)
    assert water == pytest.approx(14.1 / 50.9, abs=0.06)


def test_water_filling_is_the_closed_form_where_nothing_is_clipped():
    table_groups = log_normal(200, 0)
    table = modelled(table_groups, np.arange(0, 12, 1 / 16))
    loss = total(table.loss, WATER(table, 5 * 64 * 200))
    geometric_mean = math.exp(np.mean([math.log(u.score) for u in table_groups]))
    assert loss == pytest.approx(200 * geometric_mean * 4**-5, rel=2e-3)


@pytest.mark.parametrize("seed", range(5))
def test_with_real_rates_sizes_and_tables_water_filling_still_beats_both_rules(seed):
    draws = np.random.default_rng(seed)
    table_groups = log_normal(40, seed, sizes=(64 * draws.integers(20, 300, 40)).tolist())
    offered = [0.75, 1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 3, 3.5, 4]
    table = modelled(table_groups, offered, tables=[int(32 * 4**b) for b in offered])
    budget = 2 * sum(u.num_weights for u in table_groups)
    losses = [total(table.loss, p(table, budget)) for p in (EXACT, GREEDY, WATER, RATIO, Uniform(tolerance=0.0, spread=False))]
    assert losses[0] <= losses[1] * (1 + 1e-9)
    assert losses == sorted(losses)


def test_the_ratio_rule_is_its_formula_on_a_fine_grid():
    table_groups = log_normal(50, 3, sizes=[64 + 10 * i for i in range(50)])
    step = 1 / 64
    table = modelled(table_groups, np.arange(0, 16, step))
    n = np.array([u.num_weights for u in table_groups])
    importance = np.array([u.score for u in table_groups]) / n
    importance /= np.exp((n * np.log(importance)).sum() / n.sum())
    logs = np.log2(importance + 1)
    expected = 2 * n.sum() * logs / (n * logs).sum()
    choice = RATIO(table, 2 * int(n.sum()))
    assert np.abs(expected - [table.rates[r].index_bits for r in choice]).max() <= step


def layers(scores):
    """Four groups of 640 weights a layer."""
    return [table_group(4 * i + g, 640, s, block=i) for i, groups in enumerate(scores) for g, s in enumerate(groups)]


def test_the_ratio_rule_within_layers_gives_every_layer_the_same_bits():
    """The second layer's scores are a million times those of the first, in the same proportions."""
    groups = [1.0, 3.0, 10.0, 50.0]
    table = modelled(layers([groups, [1e6 * g for g in groups]]), np.arange(0, 16, 1 / 64))
    logs = np.log2(np.array(groups) / np.exp(np.log(groups).mean()) + 1)
    rates = [table.rates[r].index_bits for r in Ratio(within="layer", **OFF)(table, 2 * 8 * 640)]
    np.testing.assert_allclose(rates, np.tile(2 * logs / logs.mean(), 2), atol=1 / 64)
    whole = [table.rates[r].index_bits for r in RATIO(table, 2 * 8 * 640)]
    assert min(whole[4:]) > max(whole[:4])


def pattern(within, table, budget):
    policy = Threshold(thresholds=[0.25, 0.75], steps=[-0.5, 0.0, 0.5], within=within, **OFF)
    return [table.rates[r].index_bits for r in policy(table, budget)]


def test_thresholds_give_every_layer_the_pattern_or_the_model_its_own():
    table = modelled(layers([[1.0, 2.0, 3.0, 4.0], [80.0, 70.0, 60.0, 50.0]]), [1, 1.5, 2, 2.5, 3])
    budget = 2 * 8 * 640
    assert pattern("layer", table, budget) == [1.5, 2, 2, 2.5, 2.5, 2, 2, 1.5]
    assert pattern("model", table, budget) == [1.5, 1.5, 2, 2, 2.5, 2.5, 2, 2]


def test_what_a_base_rate_leaves_over_goes_to_the_highest_scores():
    table = modelled(layers([[1.0, 2.0, 3.0, 4.0], [80.0, 70.0, 60.0, 50.0]]), [1, 1.5, 2, 2.5, 3])
    budget = 2 * 8 * 640 + 3 * 320 + 100  # three upgrades by half a bit, and not a fourth
    assert pattern("model", table, budget) == [1.5, 1.5, 2, 2, 3, 3, 2.5, 2]


def test_units_of_equal_score_are_in_one_class():
    table = modelled(layers([[1.0, 1.0, 1.0, 1.0]]), [1, 1.5, 2, 2.5, 3])
    assert pattern("model", table, 2 * 4 * 640) == [2, 2, 2, 2]


def model(kinds, blocks, seed, tower="language"):
    """Four groups a layer; layers of some kinds and depths matter more, within each kind as within each layer."""
    draws = np.random.default_rng(seed)
    drawn = []
    for block, kind, group in itertools.product(range(blocks), range(len(kinds)), range(4)):
        depth = (block + 0.5) / blocks
        density = math.exp(group + kind - 2 * depth + 0.1 * draws.standard_normal())
        drawn.append((640 * (1 + kind), density, kinds[kind], block, depth))
    ranks = np.argsort(np.argsort([d[1] for d in drawn]))
    return [
        table_group(u, n, n * d, tower, kind, block, depth, (rank + 0.5) / len(drawn))
        for u, ((n, d, kind, block, depth), rank) in enumerate(zip(drawn, ranks, strict=True))
    ]


OFFERED = [0.75, 1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.5, 4]


def write(file, table, choice):
    """Write `allocation.parquet` as a run does, with two slices for every table group."""
    rows = [
        (u.tower, u.kind, u.depth, u.quantile, u.num_weights // 2, table.rates[r].index_bits)
        for u, r in zip(table.table_groups, choice.tolist(), strict=True)
        for _ in range(2)
    ]
    pd.DataFrame(rows, columns=["tower", "kind", "depth", "quantile", "num_weights", "index_bits"]).to_parquet(file)
    return Transfer(source=str(file), depth_bins=3, quantile_bins=4, **OFF)


def bits_of(table, choice):
    return np.array([table.rates[r].index_bits for r in choice.tolist()])


def test_transfer_finds_its_source_again(tmp_path):
    table = modelled(model(["q_proj", "up_proj", "down_proj"], 6, 0), OFFERED)
    budget = 2 * sum(u.num_weights for u in table.table_groups)
    source = EXACT(table, budget)
    transferred = write(tmp_path / "allocation.parquet", table, source)(table, budget)
    assert np.abs(bits_of(table, transferred) - bits_of(table, source)).mean() < 0.2
    assert np.corrcoef(bits_of(table, transferred), bits_of(table, source))[0, 1] > 0.9
    assert total(table.loss, transferred) < 0.5 * total(table.loss, Uniform(tolerance=0.0, spread=False)(table, budget))


def test_transfer_helps_another_model_of_other_kinds_and_depth_at_another_budget(tmp_path):
    source = modelled(model(["q_proj", "up_proj", "down_proj"], 6, 0), OFFERED)
    rule = write(tmp_path / "allocation.parquet", source, EXACT(source, 2 * sum(u.num_weights for u in source.table_groups)))
    for kinds, blocks, tower in ((["q_proj", "fc1"], 10, "language"), (["wqkv", "w1", "w2"], 3, "vision")):
        table = modelled(model(kinds, blocks, 1, tower), OFFERED)
        budget = int(2.5 * sum(u.num_weights for u in table.table_groups))
        choice = rule(table, budget)
        assert budget - total(table.bits, choice) < max(u.num_weights for u in table.table_groups)
        assert total(table.loss, choice) < 0.8 * total(table.loss, Uniform(tolerance=0.0, spread=False)(table, budget))


def test_transfer_backs_off_from_the_narrowest_cell_to_the_whole_model(tmp_path):
    columns = ["tower", "kind", "depth", "quantile", "num_weights", "index_bits"]
    rows = [
        ("language", "q_proj", 0.1, 0.1, 100, 1.0),
        ("language", "q_proj", 0.9, 0.1, 300, 2.0),
        ("language", "up_proj", 0.9, 0.1, 400, 3.25),
        ("vision", "q_proj", 0.9, 0.1, 200, 4.5),
    ]
    pd.DataFrame(rows, columns=columns).to_parquet(tmp_path / "allocation.parquet")
    expected = {
        ("language", "q_proj", 0.2, 0.2): 1.0,
        ("language", "q_proj", 0.5, 0.2): 1.75,  # no such depth: 100 weights of 1 bit and 300 of 2
        ("language", "down_proj", 0.9, 0.0): 2.5,  # no such kind
        ("projector", "linear", 0.5, 0.2): 2.9,  # no such tower
        ("vision", "q_proj", 0.9, 1.0): 2.9,  # no such quantile anywhere: the mean
    }
    table_groups = [table_group(u, 1000, 1.0, t, k, 0, d, q) for u, (t, k, d, q) in enumerate(expected)]
    table = modelled(table_groups, np.arange(0, 6, 0.05))
    rule = Transfer(source=str(tmp_path / "allocation.parquet"), depth_bins=3, quantile_bins=4, **OFF)
    got = bits_of(table, rule(table, int(1000 * sum(expected.values())) + 5))
    assert got == pytest.approx(np.array(list(expected.values())), abs=0.051)
