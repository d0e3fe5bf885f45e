"""Is a difference between two methods real? Seeds and samples are crossed: every seed answers the same questions.

A difference is d[s, n] = mean + seed_s + sample_n + residual_sn with all three random: a claim is about other seeds *and* other
questions. The mean gets a t test whose variance comes from the mean squares of the two-way table, with the degrees of freedom
of Satterthwaite (1946). How often it errs: `experiments/simulate_null`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, stats

LEVEL, ALPHA, FOUND = 0.95, 0.05, 0.8  # of intervals; of p; how often a difference is found that studies are planned for


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """A mean difference and how sure it is.

    All but the mean is NaN where a single number leaves nothing to estimate a spread from; all is NaN where a difference is.
    """

    mean: float
    """The mean difference."""
    low: float
    """The lower end of its interval."""
    high: float
    """The upper end of its interval."""
    p: float
    """The two-sided p of "no difference"."""
    df: float
    """The degrees of freedom of the t distribution."""
    se: float
    """The standard error of the mean."""
    num_seeds: int
    """How many seeds the differences have."""
    num_samples: int
    """How many samples (clusters of questions) they have."""

    @property
    def samples_only(self) -> bool:
        """One seed: the claim is about other questions to these very runs, not about other seeds."""
        return self.num_seeds == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """The parts of the variance of a difference."""

    seed: float
    """The variance between seeds."""
    sample: float
    """The variance between samples."""
    residual: float
    """What neither explains."""


def paired_difference(d: Float[np.ndarray, "seeds samples"]) -> Effect:
    """The effect of differences paired by seed and sample, its interval covering `LEVEL` of the time.

    An arm in which nothing is random has one row for all seeds: `a - b` of numpy repeats it. If both have one row, the result
    is `samples_only`. Differences that are all equal have an interval of width 0, and p = 1 if they are 0, else p = 0.
    """
    mean, se, df = (float(x) for x in two_way(d))
    half = float(stats.t.ppf((1 + LEVEL) / 2, df)) * se
    num_seeds, num_samples = d.shape
    p = float(p_value(np.asarray(mean), np.asarray(se), np.asarray(df)))
    return Effect(mean=mean, low=mean - half, high=mean + half, p=p, df=df, se=se, num_seeds=num_seeds, num_samples=num_samples)


def two_way(
    d: Float[np.ndarray, "*studies seeds samples"],
) -> tuple[Float[np.ndarray, "*studies"], Float[np.ndarray, "*studies"], Float[np.ndarray, "*studies"]]:
    """Mean, its standard error and the degrees of freedom of every study; NaN instead of the last two for a single number."""
    seeds, samples = d.shape[-2:]
    se, df = _spread(*_mean_squares(d), seeds, samples)
    return np.asarray(d.mean((-2, -1))), np.asarray(se), np.asarray(df)


def p_value(
    mean: Float[np.ndarray, "*studies"], se: Float[np.ndarray, "*studies"], df: Float[np.ndarray, "*studies"]
) -> Float[np.ndarray, "*studies"]:
    """Two-sided p of the t test; without any spread 1 for a mean of 0, else 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where((se == 0) & (mean == 0), 0.0, np.abs(mean) / se)
    return np.asarray(2 * stats.t.sf(t, df))


def _mean_squares(d: Float[np.ndarray, "*studies seeds samples"]) -> tuple[Any, Any, Any]:
    """The mean squares of seeds, samples and residual. With one seed the samples' is all there is, with one sample the seeds'."""
    seeds, samples = d.shape[-2:]
    mean = d.mean((-2, -1))
    by_seed = d.mean(-1) - mean[..., None]
    by_sample = d.mean(-2) - mean[..., None]
    residual = d - mean[..., None, None] - by_seed[..., :, None] - by_sample[..., None, :]
    ms_seed = samples * np.square(by_seed).sum(-1) / max(seeds - 1, 1)
    ms_sample = seeds * np.square(by_sample).sum(-1) / max(samples - 1, 1)
    ms_residual = np.square(residual).sum((-2, -1)) / max((seeds - 1) * (samples - 1), 1)
    return ms_seed, ms_sample, ms_residual * (seeds > 1 and samples > 1)  # else: rounding noise


def _spread(ms_seed: Any, ms_sample: Any, ms_residual: Any, seeds: int, samples: int) -> tuple[Any, Any]:
    """Standard error and degrees of freedom of the mean of a two-way table, from its mean squares."""
    if seeds * samples == 1:
        return np.full_like(ms_seed, np.nan), np.full_like(ms_seed, np.nan)
    total = ms_seed + ms_sample - ms_residual
    total = np.where(total > 0, total, np.maximum(ms_seed, ms_sample))  # an estimate may come out negative, a variance cannot
    of_seed, of_sample = max(seeds - 1, 1), max(samples - 1, 1)
    scatter = ms_seed**2 / of_seed + ms_sample**2 / of_sample + ms_residual**2 / (of_seed * of_sample)
    # Without a floor a small `total` makes the interval as wide as one likes; all spread may be that of the fewer of the two.
    least = max(seeds, samples) - 1 if 1 in (seeds, samples) else min(seeds, samples) - 1
    with np.errstate(invalid="ignore"):
        df = np.where(scatter > 0, np.maximum(total**2 / scatter, least), least)
    return np.sqrt(total / (seeds * samples)), df


def reweighted(
    d: Float[np.ndarray, "seeds questions"], weights: Float[np.ndarray, "questions"], clusters: Int[np.ndarray, "questions"]
) -> Float[np.ndarray, "seeds clusters"]:
    """One column a cluster, so that their plain mean is the weighted sum `d @ weights` exactly.

    Column c is (number of clusters) * sum over its questions n of w_n d_n: a metric that weighs questions becomes a mean of
    independent samples, which is what the test asks for. Questions about one image are not independent: taken so, they make the
    standard error too small; hence the clusters. Those without any weight are left out. Without a difference every column has
    mean 0 whatever the weights, so the test keeps its size; with one, that it differs by type of question counts as spread among
    the samples, which makes the interval wider rather than narrower.
    """
    kept = weights > 0
    names, index = np.unique(clusters[kept], return_inverse=True)
    return (d[:, kept] * weights[kept]) @ (index[:, None] == np.arange(len(names))) * len(names)


def holm(p: Float[np.ndarray, "tests"]) -> Float[np.ndarray, "tests"]:
    """Holm's step-down adjusted p values; NaN is no test, stays NaN and does not count (Holm 1979)."""
    adjusted = np.full(len(p), np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def variance_components(d: Float[np.ndarray, "seeds samples"]) -> Components:
    """Moment estimates, those below 0 cut off there. Raises ValueError for fewer than two seeds or samples."""
    seeds, samples = d.shape
    if min(seeds, samples) < 2:
        raise ValueError(f"{seeds} seeds x {samples} samples do not tell the components apart; two of each do")
    ms_seed, ms_sample, ms_residual = (float(x) for x in _mean_squares(d))
    return Components(
        seed=max(ms_seed - ms_residual, 0) / samples, sample=max(ms_sample - ms_residual, 0) / seeds, residual=ms_residual
    )


def power(effect: float, components: Components, *, num_seeds: int, num_samples: int, num_tests: int = 1) -> float:
    """How often a true difference of `effect` is found by `paired_difference` with p <= ALPHA / num_tests.

    Noncentral t at the expected mean squares. Dividing by `num_tests` is the first step of Holm, so with several real differences
    the power is a little better. With one seed the seeds' component plays no role, as in the test.
    """
    crossed = num_seeds > 1 and num_samples > 1
    of_seed = num_samples * components.seed + components.residual if num_seeds > 1 else 0.0
    of_sample = num_seeds * components.sample + components.residual if num_samples > 1 else 0.0
    squares = np.array([of_seed, of_sample, components.residual if crossed else 0.0])
    se, df = (float(x) for x in _spread(squares[0], squares[1], squares[2], num_seeds, num_samples))
    if se == 0:
        return float(effect != 0)
    critical = float(stats.t.isf(ALPHA / num_tests / 2, df))
    shift = abs(effect) / se
    return float(stats.nct.sf(critical, df, shift) + stats.nct.sf(critical, df, -shift))  # nct.cdf(-critical) may be NaN


def smallest_difference(components: Components, *, num_seeds: int, num_samples: int, num_tests: int = 1) -> float:
    """The true difference that is found with probability `FOUND` (see `power`); 0 without any spread."""

    def missing(effect: float) -> float:
        return FOUND - power(effect, components, num_seeds=num_seeds, num_samples=num_samples, num_tests=num_tests)

    largest = np.sqrt(components.seed + components.sample + components.residual)
    if largest == 0:
        return 0.0
    while missing(largest) > 0:
        largest *= 2
    return float(optimize.root_scalar(missing, bracket=(0, largest), rtol=1e-6).root)
