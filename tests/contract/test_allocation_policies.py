"""Every policy on any table: within the budget, above its floors, nothing useful left over, and errors that say why."""

import dataclasses

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from variants import built, everyone

from mgvq.allocation.exact import Exact
from mgvq.allocation.transfer import Transfer
from mgvq.allocation.uniform import Uniform
from mgvq.errors import UserError
from mgvq.protocols import Allocation
from mgvq.types import Rate, RateTable, TableGroupInfo

OFF = dict(min_bits=None, min_bits_kv=None)
ALL = everyone("allocation")
POLICIES = {name: policy for name, policy in ALL.items() if hasattr(policy, "min_bits")}  # those that give out bits by need
BY_LOSS = {name: policy for name, policy in POLICIES.items() if policy.distortion}
RULES = {name: policy for name, policy in POLICIES.items() if not policy.distortion}
BY_SCORE = {name: policy for name, policy in RULES.items() if name != "transfer"}  # which has its wishes from another run
KINDS = ("q_proj", "k_proj", "v_proj", "down_proj")
any_table = settings(max_examples=15, derandomize=True, deadline=None, database=None)


def make(sizes, scores, offered, table_bits, noise):
    """Table groups whose codes are padded to whole bytes and whose tables cost `table_bits` a rate, with losses of any shape."""
    kinds = [KINDS[u % 4] for u in range(len(sizes))]
    table_groups = [
        TableGroupInfo(f"u{u}", "language", kinds[u], u // 4, 0.5, 0, n, s, (u + 0.5) / len(sizes))
        for u, (n, s) in enumerate(zip(sizes, scores, strict=True))
    ]
    rates = [Rate(f"r{i}", b) for i, b in enumerate(sorted(offered))]
    bits = [[8 * -int(-n * r.index_bits // 8) + extra for r, extra in zip(rates, table_bits, strict=False)] for n in sizes]
    loss = [[s * 4**-r.index_bits * x for r, x in zip(rates, noise, strict=False)] for s in scores]
    return RateTable(table_groups, rates, torch.tensor(bits), torch.tensor(loss, dtype=torch.float64))


@st.composite
def tables(draw):
    """Up to nine table groups of 1 to 5000 weights, up to six rates, some of equal index bits; scores may be 0."""
    table_groups = draw(st.integers(1, 9))
    some = dict(min_size=table_groups, max_size=table_groups)
    offered = draw(st.lists(st.sampled_from([0.75, 1.0, 4 / 3, 1.5, 2.0, 2.5, 3.0, 4.0]), min_size=1, max_size=6))
    return make(
        draw(st.lists(st.integers(1, 5000), **some)),
        draw(st.lists(st.sampled_from([0.0, 1e-9, 0.5, 1.0, 3.0, 1e4]), **some)),
        offered,
        draw(st.lists(st.sampled_from([0, 16, 64, 1024, 9000]), min_size=6, max_size=6)),
        draw(st.lists(st.floats(0.3, 3.0), min_size=6, max_size=6)),
    )


def stored(table, choice):
    return table.bits.gather(1, choice[:, None]).sum().item()


def index_bits(table, choice):
    return [table.rates[r].index_bits for r in choice.tolist()]


def budgets(table):
    """Budgets from the cheapest choice to more than everything."""
    least, most = table.bits.amin(1).sum().item(), table.bits.amax(1).sum().item()
    return [least, least + (most - least) // 3, least + 3 * (most - least) // 4, 2 * most]


@pytest.fixture(params=POLICIES)
def policy(request):
    return POLICIES[request.param]


@any_table
@given(table=tables())
def test_the_budget_is_met_and_nothing_useful_fits_any_more(table):
    before = table.bits.clone(), table.loss.clone()
    offered = torch.tensor([r.index_bits for r in table.rates])
    for name, policy in POLICIES.items():
        assert torch.equal(*(policy(table, budgets(table)[2]) for _ in range(2))), name
        for budget in budgets(table):
            choice = policy(table, budget)
            left = budget - stored(table, choice)
            assert left >= 0, name
            affordable = table.bits - table.bits.gather(1, choice[:, None]) <= left
            better = table.loss < table.loss.gather(1, choice[:, None]) * (1 - 1e-4)
            if name not in BY_LOSS:
                better = offered > offered[choice][:, None]
            if not isinstance(policy, Exact):  # which may leave what is within its gap
                assert not (affordable & better).any(), name
    assert torch.equal(table.bits, before[0])
    assert torch.equal(table.loss, before[1])


@any_table
@given(table=tables(), floor=st.sampled_from([0.5, 1.0, 1.5, 2.0]), floor_kv=st.sampled_from([None, 1.0, 2.0, 3.0]))
def test_floors_are_kept_or_refused(table, floor, floor_kv):
    kv = [u.kind in ("k_proj", "v_proj") for u in table.table_groups]
    highest = table.rates[-1].index_bits
    least = [max(floor, (floor_kv or 0) if mine else 0) for mine in kv]
    cheapest = sum(
        min((b for b, r in zip(bits, table.rates, strict=True) if r.index_bits >= needed), default=0)
        for bits, needed in zip(table.bits.tolist(), least, strict=True)
    )
    for name, plain in POLICIES.items():
        policy = dataclasses.replace(plain, min_bits=floor, min_bits_kv=floor_kv)
        if highest < max(floor, floor_kv or 0) or (floor_kv and not any(kv)):
            with pytest.raises(UserError, match=r"allocation\.min_bits"):
                policy(table, 10**9)
            continue
        choice = policy(table, cheapest)
        assert stored(table, choice) <= cheapest
        assert all(got >= needed for got, needed in zip(index_bits(table, choice), least, strict=True)), name
        with pytest.raises(UserError, match=r"budget\.bits_per_weight.*smallest rate.*allocation\.min_bits.*lower the floors"):
            policy(table, cheapest - 1)


def test_they_meet_the_protocol():
    for policy in ALL.values():
        assert isinstance(policy, Allocation)
        assert policy.distortion in ("measured", "gaussian", None)


def test_a_budget_that_nothing_fits_is_named_with_the_smallest_choice(policy):
    table = make([1000, 9], [1.0, 2.0], [1.0, 2.0], [16, 64], [1.0, 1.0])
    with pytest.raises(UserError, match=r"budget\.bits_per_weight=1\.0.* below the smallest rate .* stores 1\.039 bits a weight"):
        policy(table, table.bits[:, 0].sum().item() - 1)


@any_table
@given(table=tables(), factor=st.sampled_from([1e-12, 7.0, 1e9]))
def test_only_ratios_of_scores_count(table, factor):
    table_groups = [dataclasses.replace(u, score=u.score * factor) for u in table.table_groups]
    scaled = dataclasses.replace(table, table_groups=table_groups)
    budget = budgets(table)[1]
    for name in RULES:
        assert torch.equal(POLICIES[name](scaled, budget), POLICIES[name](table, budget)), name


@pytest.mark.parametrize("name", BY_SCORE)
def test_of_table_groups_alike_the_one_of_higher_score_has_no_less(name):
    scores = torch.rand(12, generator=torch.Generator().manual_seed(0)).exp().pow(4).tolist()
    table = make([640] * 12, scores, [1.0, 1.5, 2.0, 2.5, 3.0, 4.0], [0] * 6, [1.0] * 6)
    for budget in range(8000, 24000, 700):
        bits = index_bits(table, BY_SCORE[name](table, budget))
        layers = getattr(BY_SCORE[name], "within", "model") == "layer"
        for group in (
            [range(i, i + 4) for i in (0, 4, 8)] if layers else [range(12)]
        ):  # kinds differ, so that within a layer nothing is compared: then all are in one class
            ranked = [bits[u] for u in sorted(group, key=lambda u: scores[u])]
            assert ranked == sorted(ranked), budget


def test_scores_that_are_all_zero_give_equal_bits():
    table = make([640] * 8, [0.0] * 8, [1.0, 2.0, 3.0], [0] * 3, [1.0] * 3)
    for name in BY_SCORE:
        assert set(index_bits(table, POLICIES[name](table, 2 * 8 * 640))) == {2.0}, name


def test_a_rate_no_finer_and_no_cheaper_than_another_is_not_taken_by_score():
    """Of 2.0 bits with a small and with a large table, who sees scores alone takes the cheaper."""
    table = make([640] * 3, [1.0, 2.0, 3.0], [1.0, 2.0, 2.0, 3.0], [0, 400, 16, 900], [1.0] * 4)
    for policy in BY_SCORE.values():
        for budget in range(2000, 9000, 100):
            assert 1 not in policy(table, budget)


def test_without_kv_layers_their_floor_has_no_effect_and_is_refused():
    table = make([640], [1.0], [1.0, 2.0], [0, 0], [1.0, 1.0])
    for policy in POLICIES.values():
        with pytest.raises(UserError, match=r"allocation\.min_bits_kv=2 has no effect"):
            dataclasses.replace(policy, min_bits_kv=2.0)(table, 2000)


def test_exact_never_falls_back_where_time_runs_out():
    draws = torch.Generator().manual_seed(0)
    scores = torch.rand(300, generator=draws).exp().pow(5).tolist()
    sizes = torch.randint(1000, 9000, (300,), generator=draws).tolist()
    table = make(sizes, scores, [1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0], [0] * 7, [1.0] * 7)
    with pytest.raises(UserError, match=r"allocation\.time_limit=1e-05 s .* allocation=greedy"):
        Exact(distortion="measured", gap=0.0, time_limit=1e-5, **OFF)(table, 2 * sum(sizes))


@pytest.mark.parametrize("tolerance", [0.0, 0.1])
def test_uniform_takes_the_best_rate_that_fits(tolerance):
    table = make([4000, 90, 1], [1.0] * 3, [1.0, 2.0, 3.0, 4.0, 8.0], [32, 64, 128, 256, 4096], [1.0] * 5)
    costs = table.bits.sum(0).tolist()
    chosen = set()
    for budget in range(costs[0], costs[-1] + 500, 100):
        limit = budget * (1 + tolerance)
        fits = [cost for cost in costs if cost <= limit]
        if len(fits) < len(costs) and fits[-1] < 0.75 * budget:
            with pytest.raises(UserError, match=r"between two rates .*r\d stores .* bits a weight, r\d"):
                Uniform(tolerance=tolerance, spread=False)(table, budget)
            continue
        choice = Uniform(tolerance=tolerance, spread=False)(table, budget)
        assert choice.tolist() == [len(fits) - 1] * 3
        chosen.add(len(fits) - 1)
    assert {0, 4} <= chosen


def test_uniform_takes_the_finest_of_rates_that_cost_the_same():
    one_weight = make([1], [1.0], [1.0, 2.0, 8.0], [0] * 3, [1.0] * 3)  # any code of 1 to 8 bits takes a byte
    assert Uniform(tolerance=0.0, spread=False)(one_weight, 64).tolist() == [2]


def test_uniform_names_the_smallest_rate_where_nothing_fits():
    table = make([4000, 90], [1.0] * 2, [1.0, 2.0], [32, 64], [1.0] * 2)
    cost = table.bits[:, 0].sum().item()
    with pytest.raises(UserError, match=rf"budget\.bits_per_weight=.*: r0 stores {cost / 4090:.3f} bits"):
        Uniform(tolerance=0.1, spread=False)(table, int(cost / 1.11))


FINE = {
    "uniform": Uniform(tolerance=0.0, spread=False),
    **{name: built("allocation", name) for name in ("threshold", "ratio", "water_filling", "greedy", "exact")},
}


@pytest.mark.parametrize(
    ("policy", "name", "value"),
    [
        ("uniform", "tolerance", -0.01), ("uniform", "tolerance", 0.51), ("uniform", "tolerance", float("nan")),
        *((p, f, v) for p in FINE if p != "uniform" for f in OFF for v in (0, -1.0, float("nan"), float("inf"), "2", True)),
        ("threshold", "thresholds", [0.5, 0.5]), ("threshold", "thresholds", [0.0, 0.5]), ("threshold", "thresholds", [0.5, 1.0]),
        ("threshold", "steps", [0.0, 1.0]), ("threshold", "steps", [0.0, 0.0, 1.0]), ("threshold", "within", "tower"),
        ("ratio", "within", "tower"),
        ("greedy", "distortion", "guessed"), ("exact", "distortion", None),
        ("exact", "gap", -1e-4), ("exact", "gap", 1.0), ("exact", "gap", float("nan")),
        ("exact", "time_limit", 0), ("exact", "time_limit", float("nan")),
    ],
)  # fmt: skip
def test_a_bad_setting_is_named_with_its_value(policy, name, value):
    # Built without __init__, where the type checker of the tests, which a run does not have, would speak first.
    bad = object.__new__(type(FINE[policy]))
    for key, setting in (vars(FINE[policy]) | {name: value}).items():
        object.__setattr__(bad, key, setting)
    with pytest.raises(UserError) as error:
        bad.__post_init__()
    assert str(error.value).startswith(f"allocation.{name} must")
    assert str(value) in str(error.value)


def test_transfer_names_a_bad_source_when_it_is_built(tmp_path):
    other, empty = tmp_path / "other.parquet", tmp_path / "empty.parquet"
    pd.DataFrame({"tower": ["language"]}).to_parquet(other)
    columns = ["tower", "kind", "depth", "quantile", "num_weights", "index_bits"]
    pd.DataFrame({c: pd.Series(dtype=float) for c in columns}).to_parquet(empty)
    (tmp_path / "text.parquet").write_text("no table")
    for file in (tmp_path, tmp_path / "missing.parquet", tmp_path / "text.parquet", other, empty):
        with pytest.raises(UserError, match=rf"allocation\.source={file} "):
            Transfer(source=str(file), depth_bins=3, quantile_bins=4, **OFF)


@pytest.mark.parametrize("name", ["depth_bins", "quantile_bins"])
def test_transfer_needs_a_bin(name, tmp_path):
    with pytest.raises(UserError, match=rf"allocation\.{name} .* got 0"):
        Transfer(**(dict(source=str(tmp_path), depth_bins=3, quantile_bins=4, **OFF) | {name: 0}))
