"""The test of a difference holds what it promises: size, coverage and power by simulation, formulas against plain arithmetic."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mgvq.analysis.statistics.significance import (
    Components,
    holm,
    p_value,
    paired_difference,
    power,
    reweighted,
    smallest_difference,
    two_way,
    variance_components,
)

# The standard deviations of a difference of headline accuracies on the small models, roughly.
TYPICAL = Components(seed=0.01**2, sample=0.2**2, residual=0.17**2)
NO_SEEDS = Components(seed=0.0, sample=0.3**2, residual=0.3**2)
MUCH_SEED = Components(seed=0.04**2, sample=0.2**2, residual=0.17**2)


def studies(number: int, seeds: int, samples: int, parts: Components, mean: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    d = np.full((number, seeds, samples), mean)
    d += rng.normal(0, parts.seed**0.5, (number, seeds, 1))
    d += rng.normal(0, parts.sample**0.5, (number, 1, samples))
    return d + rng.normal(0, parts.residual**0.5, d.shape)


@pytest.mark.parametrize("seeds", [5, 8])
@pytest.mark.parametrize("parts", [TYPICAL, NO_SEEDS, MUCH_SEED], ids=["typical", "no seeds", "much seed"])
def test_a_true_null_is_rejected_five_times_in_a_hundred(parts: Components, seeds: int) -> None:
    """With as many seeds as studies have; with two or three it may be more often (results/tables/null_simulation.md)."""
    mean, se, df = two_way(studies(4000, seeds, 200, parts))
    assert 0.035 <= (p_value(mean, se, df) < 0.05).mean() <= 0.065


@pytest.mark.parametrize(("seeds", "samples"), [(5, 2), (5, 3), (2, 5)])
def test_a_few_samples_or_seeds_do_not_pass_for_many(seeds: int, samples: int) -> None:
    """All spread may be that of the fewer of the two, of two texts say: so many degrees of freedom and no more."""
    few = Components(seed=float(seeds < samples), sample=float(samples < seeds), residual=1e-4)
    mean, se, df = two_way(studies(4000, seeds, samples, few))
    assert (p_value(mean, se, df) < 0.05).mean() <= 0.065


@pytest.mark.parametrize("parts", [TYPICAL, MUCH_SEED], ids=["typical", "much seed"])
def test_the_interval_covers_the_true_difference(parts: Components) -> None:
    d = studies(1000, 5, 100, parts, mean=0.03)
    effects = [paired_difference(x) for x in d]
    assert 0.93 <= np.mean([e.low <= 0.03 <= e.high for e in effects]) <= 0.97
    assert [e.p < 0.05 for e in effects] == [not e.low <= 0 <= e.high for e in effects]


@pytest.mark.parametrize("num_tests", [1, 4])
@pytest.mark.parametrize("parts", [TYPICAL, NO_SEEDS, MUCH_SEED], ids=["typical", "no seeds", "much seed"])
def test_a_planted_difference_is_found_as_often_as_predicted(parts: Components, num_tests: int) -> None:
    design = {"num_seeds": 5, "num_samples": 200, "num_tests": num_tests}
    planted = smallest_difference(parts, **design)
    assert power(planted, parts, **design) == pytest.approx(0.8, abs=1e-4)
    p = p_value(*two_way(studies(3000, 5, 200, parts, mean=planted)))
    assert (p <= 0.05 / num_tests).mean() == pytest.approx(0.8, abs=0.05)


def test_the_mean_squares_are_those_of_a_table_written_out() -> None:
    """The textbook's sums, cell by cell, on numbers small enough to follow."""
    d = np.array([[1.0, 0, 2, -1], [0, 1, 1, 0], [2, 2, 0, 1]])
    seeds, samples = d.shape
    m = sum(d[s, n] for s in range(seeds) for n in range(samples)) / 12
    rows, columns = [sum(row) / samples for row in d], [sum(column) / seeds for column in d.T]
    of_seed = samples * sum((r - m) ** 2 for r in rows) / (seeds - 1)
    of_sample = seeds * sum((c - m) ** 2 for c in columns) / (samples - 1)
    cells = itertools.product(range(seeds), range(samples))
    rest = sum((d[s, n] - rows[s] - columns[n] + m) ** 2 for s, n in cells) / ((seeds - 1) * (samples - 1))
    total = max(of_seed + of_sample - rest, 0) or max(of_seed, of_sample)
    se = (total / 12) ** 0.5
    df = max(total**2 / (of_seed**2 / 2 + of_sample**2 / 3 + rest**2 / 6), 2)
    effect = paired_difference(d)
    assert (effect.mean, effect.se, effect.df) == pytest.approx((m, se, df))
    assert effect.p == pytest.approx(2 * stats.t.sf(m / se, df))
    assert effect.high - effect.mean == pytest.approx(stats.t.ppf(0.975, df) * se)
    parts = variance_components(d)
    assert (parts.seed, parts.sample, parts.residual) == (max(of_seed - rest, 0) / 4, max(of_sample - rest, 0) / 3, rest)


def test_one_seed_is_the_paired_t_test_over_samples_and_one_sample_that_over_seeds() -> None:
    """Five differences whose p and interval are known."""
    d = np.array([0.712, 0.705, 0.721, 0.698, 0.715]) - np.array([0.701, 0.699, 0.708, 0.700, 0.703])
    over_samples, over_seeds = paired_difference(d[None]), paired_difference(d[:, None])
    for effect in (over_samples, over_seeds):
        assert effect.p == pytest.approx(0.0448775010)
        assert (effect.low, effect.high) == pytest.approx((0.000295678, 0.015704322), abs=1e-9)
        assert effect.df == pytest.approx(4)
    assert over_samples.samples_only
    assert not over_seeds.samples_only


def test_a_deterministic_arm_counts_once_for_every_seed() -> None:
    rng = np.random.default_rng(1)
    random, fixed = rng.normal(size=(4, 30)), rng.normal(size=(1, 30))
    assert paired_difference(random - fixed) == paired_difference(random - np.repeat(fixed, 4, 0))


def test_differences_without_spread_have_an_answer() -> None:
    same, shifted = paired_difference(np.zeros((3, 5))), paired_difference(np.full((3, 5), 0.5))
    assert (same.low, same.high, same.p) == (0, 0, 1)
    assert (shifted.low, shifted.high, shifted.p) == (0.5, 0.5, 0)
    alone = paired_difference(np.array([[0.5]]))
    assert alone.mean == 0.5
    assert np.isnan([alone.low, alone.high, alone.p, alone.se]).all()


def test_a_variance_estimated_below_zero_leaves_a_finite_interval() -> None:
    """Rows and columns that agree better than chance: the mean squares' sum is negative."""
    d = np.array([[1.0, -1.0], [-1.0, 1.0]])
    effect = paired_difference(d + np.array([[0.1], [0.0]]))
    assert effect.se > 0
    assert np.isfinite([effect.low, effect.high]).all()
    assert effect.df >= 1


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(2, 40), st.floats(0.01, 100))
def test_the_result_moves_with_the_numbers(seed: int, seeds: int, samples: int, scale: float) -> None:
    """Scaling scales, the order of seeds and samples is none of its business, a swap of the arms changes the sign."""
    rng = np.random.default_rng(seed)
    d = rng.normal(size=(seeds, samples)) + rng.normal(size=(seeds, 1))
    effect, larger, swapped = paired_difference(d), paired_difference(scale * d), paired_difference(-d)
    mixed = paired_difference(d[rng.permutation(seeds)][:, rng.permutation(samples)])
    assert larger.high == pytest.approx(scale * effect.high)
    assert (swapped.low, swapped.p) == pytest.approx((-effect.high, effect.p))
    assert (mixed.low, mixed.p, larger.p) == pytest.approx((effect.low, effect.p, effect.p))
    assert effect.df >= min(seeds, samples) - 1 - 1e-9


def test_the_weighted_mean_is_the_headline() -> None:
    """Unequal numbers of questions of each type, pictures of different sizes, some pictures with controls only."""
    rng = np.random.default_rng(2)
    types = rng.choice(["count", "where", "digit", "color"], 200, p=[0.6, 0.2, 0.1, 0.1])
    pictures = np.sort(rng.integers(0, 70, 200))
    scores = (rng.random((3, 200)) < 0.5).astype(float)
    headline = ["count", "where", "digit"]
    weights = np.array([1 / 3 / (types == t).sum() if t in headline else 0.0 for t in types])
    columns = reweighted(scores, weights, pictures)
    expected = [pd.Series(row).groupby(types).mean()[headline].mean() for row in scores]
    assert columns.mean(1) == pytest.approx(expected)
    assert columns.shape[1] == len(np.unique(pictures[np.isin(types, headline)]))


def test_equal_weights_and_single_questions_leave_the_numbers_alone() -> None:
    d = np.random.default_rng(3).normal(size=(2, 9))
    assert reweighted(d, np.full(9, 1 / 9), np.arange(9)) == pytest.approx(d)


def test_questions_of_a_picture_that_agree_do_not_pass_for_many() -> None:
    """Every question asked four times: as their clusters, the standard error is that of asking once."""
    once = np.random.default_rng(4).normal(size=(3, 50))
    four = np.repeat(once, 4, axis=1)
    columns = reweighted(four, np.full(200, 1 / 200), np.repeat(np.arange(50), 4))
    assert paired_difference(columns).se == pytest.approx(paired_difference(once).se)
    assert paired_difference(four[:1]).se == pytest.approx(paired_difference(once[:1]).se / 2, rel=0.02)


def test_holm() -> None:
    """The values are those of statsmodels, and of the rule step by step; NaN is no test."""
    assert holm(np.array([0.01, 0.04, 0.03, 0.005, 0.2])) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.2])
    assert holm(np.array([0.01, np.nan, 0.03])) == pytest.approx([0.02, np.nan, 0.03], nan_ok=True)
    assert holm(np.array([0.6, 0.7])) == pytest.approx([1, 1])
    assert len(holm(np.array([]))) == 0


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.5))
def test_holm_rejects_what_the_procedure_rejects(p: list[float], alpha: float) -> None:
    """Holm's own words: from the smallest p on, compare with alpha / (tests left), stop at the first that fails."""
    adjusted = holm(np.array(p))
    rejected: set[int] = set()
    for left, i in zip(range(len(p), 0, -1), np.argsort(p, kind="stable"), strict=True):
        if p[i] * left > alpha:
            break
        rejected.add(int(i))
    assert {i for i, a in enumerate(adjusted) if a <= alpha} == rejected


def test_components_are_recovered() -> None:
    found = [variance_components(d) for d in studies(300, 6, 100, MUCH_SEED)]
    for name in ("seed", "sample", "residual"):
        assert np.mean([getattr(parts, name) for parts in found]) == pytest.approx(getattr(MUCH_SEED, name), rel=0.1)
    with pytest.raises(ValueError, match="1 seeds x 5 samples"):
        variance_components(np.ones((1, 5)))


def test_power_is_that_of_the_paired_t_test_with_one_seed() -> None:
    """scipy's noncentral t by hand, and the limits: no difference is found 5 % of the time, no spread always."""
    parts = Components(seed=1.0, sample=0.25, residual=0.75)  # of 1.0 a question; that between seeds cannot be seen
    found = power(0.3, parts, num_seeds=1, num_samples=50)
    critical, shift = stats.t.ppf(0.975, 49), 0.3 * 50**0.5
    assert found == pytest.approx(1 - stats.nct.cdf(critical, 49, shift) + stats.nct.cdf(-critical, 49, shift))
    assert power(0.0, TYPICAL, num_seeds=5, num_samples=50) == pytest.approx(0.05)
    assert power(0.0, TYPICAL, num_seeds=5, num_samples=50, num_tests=2) == pytest.approx(0.025)
    nothing = Components(seed=0.0, sample=0.0, residual=0.0)
    assert smallest_difference(nothing, num_seeds=3, num_samples=4) == 0
    assert power(1e-9, nothing, num_seeds=3, num_samples=4) == 1


def test_more_of_anything_finds_smaller_differences() -> None:
    def smallest(seeds: int, samples: int, tests: int = 1) -> float:
        return smallest_difference(TYPICAL, num_seeds=seeds, num_samples=samples, num_tests=tests)

    assert smallest(8, 200) < smallest(5, 200) < smallest(3, 200)
    assert smallest(5, 400) < smallest(5, 200) < smallest(5, 200, tests=5)
