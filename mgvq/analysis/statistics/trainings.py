"""Is a result one of the model's weights or of the method? One model trained from several seeds, each quantised from several.

A figure of an arm is y[m, s] = mean + training_m + seed_ms, both random, on questions that all runs share. The mean has its
interval over trainings: the claim is about a model that was trained again. The two variances are those of the one-way analysis
(Searle, Casella and McCulloch 1992, chapter 3), and whether trainings differ at all is its F test.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from mgvq.analysis.records.records import StudyRecord
from mgvq.analysis.statistics.measures import MEASURES, Measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A figure's mean over trainings and its standard deviations, in the metric's unit."""

    means: tuple[float, ...]
    """The mean over the seeds of every training."""
    low: float
    """The lower end of the interval in which the mean over any number of trainings lies, 95 times of 100 (t, one degree of
    freedom less than there are trainings)."""
    high: float
    """The upper end of that interval."""
    trainings: float
    """The component between trainings, 0 where its estimate is negative."""
    seeds: float | None
    """The component between seeds; None for one run a training."""
    share: float | None
    """The trainings' part of their joint variance; None for one run a training."""
    p: float | None
    """The p of "the trainings do not differ"; None for one run a training."""

    @property
    def mean(self) -> float:
        """The mean over trainings."""
        return float(np.mean(self.means))


def split(values: Float[np.ndarray, "trainings seeds"]) -> Split:
    """The mean and the components of a figure. Raises ValueError for fewer than two trainings."""
    num_trainings, num_seeds = values.shape
    if num_trainings < 2:
        raise ValueError("one training has no spread between trainings")
    means = values.mean(1)
    of_means = float(means.var(ddof=1))
    half = float(stats.t.ppf(0.975, num_trainings - 1)) * (of_means / num_trainings) ** 0.5
    low, high = float(means.mean()) - half, float(means.mean()) + half
    told = tuple(float(mean) for mean in means)
    if num_seeds == 1:
        return Split(means=told, low=low, high=high, trainings=of_means**0.5, seeds=None, share=None, p=None)
    within = float(values.var(1, ddof=1).mean())
    between = max(of_means - within / num_seeds, 0.0)
    share = between / (between + within) if between + within else 0.0
    ratio = num_seeds * of_means / within if within else np.inf if of_means else 0.0
    p = float(stats.f.sf(ratio, num_trainings - 1, num_trainings * (num_seeds - 1)))
    return Split(means=told, low=low, high=high, trainings=between**0.5, seeds=within**0.5, share=share, p=p)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number that the table of trainings splits."""

    measure: Measure
    """What is measured."""
    minus: str
    """The arm that it is held against: full precision or the baseline; empty for the metric itself."""
    arm: str
    """The arm that was measured."""
    split: Split
    """The means of the trainings and the parts of their variance."""


def splits(record: StudyRecord) -> Iterator[Figure]:
    """The figures of every arm: the metric, and its differences to full precision and to the baseline.

    Differences are taken within a training, at equal seeds. An arm that lacks a run, or a finite value, has no figure.
    """
    full = next((cell.arm for cell in sorted(record.cells, key=lambda cell: cell.arm) if cell.is_full_precision), None)
    for name in record.kind.measures:
        measure = MEASURES[name]
        found = _values(record, measure)
        for other in dict.fromkeys(("", full, record.baseline)):
            if other is None or (other and other not in found):
                continue
            for arm, values in found.items():
                if arm != other and not (other and arm == full):
                    difference = values - found[other] if other else values
                    yield Figure(measure=measure, minus=other, arm=arm, split=split(difference))


def _values(record: StudyRecord, measure: Measure) -> Mapping[str, Float[np.ndarray, "trainings seeds"]]:
    """The metric of every run, by arm; one seed where all seeds are one run."""
    weights = measure.weigh(record.questions, record.kind)
    found = {}
    for arm in record.arms:
        cells = [cell for cell in record.cells if cell.arm == arm]
        if any(cell.missing for cell in cells):
            continue
        values = np.stack([cell.values(measure.column) @ weights for cell in cells])
        if np.isfinite(values).all():
            found[arm] = values
    return found
