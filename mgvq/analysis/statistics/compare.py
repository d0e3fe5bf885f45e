"""Every arm against the study's baseline, at every point of its grid, with intervals and p values."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mgvq.analysis.records.records import Cell, Point, StudyRecord
from mgvq.analysis.statistics.leniency import ALPHA, is_lenient
from mgvq.analysis.statistics.measures import MEASURES, Measure, measure_of
from mgvq.analysis.statistics.significance import Effect, holm, paired_difference, reweighted


@dataclass(frozen=True, slots=True, kw_only=True)
class Procedure:
    """How a difference is tested, and how its p value is corrected for the other arms of its grid point."""

    test: Callable[[Float[np.ndarray, "seeds clusters"]], Effect]
    """The test: it makes an effect of the differences of two arms, paired by seed and cluster of questions."""
    correct: Callable[[Float[np.ndarray, "tests"]], Float[np.ndarray, "tests"]]
    """The correction: it adjusts the p values of a grid point; NaN is no test, and stays NaN."""
    test_name: str
    """The test in the note under a table."""
    correction_name: str
    """The correction in the note under a table."""


# The one place that says which statistics the studies use; both functions are in `significance.py`.
PROCEDURE = Procedure(test=paired_difference, correct=holm, test_name="two-way random-effects t test", correction_name="Holm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """An arm minus the baseline."""

    effect: Effect
    """The difference with its interval, and its p alone."""
    p: float
    """The p value, corrected for the other arms of the point unless the comparison was planned."""
    planned: bool
    """Whether this is the comparison that the study named before its first run."""

    @property
    def is_decided(self) -> bool:
        """Whether the difference is taken for real: p below .05, of a test that keeps what it promises."""
        return self.p < ALPHA and not is_lenient(self.effect.num_seeds)

    @property
    def is_suggestive(self) -> bool:
        """Whether p is below .05, of a test with too few seeds to decide."""
        return self.p < ALPHA and is_lenient(self.effect.num_seeds)


def differences(record: StudyRecord, measure: Measure) -> Iterator[tuple[Point, str, Float[np.ndarray, "seeds clusters"]]]:
    """Grid point, arm, and its differences to the baseline, whose mean is the difference of the metric.

    The baseline has none, nor has an arm that shares no seed with it. NaN where a question has no finite value.
    """
    weights = measure.weigh(record.questions, record.kind)
    clusters = record.questions.picture.to_numpy()
    for point in record.points:
        cells = record.at(point)
        base = cells.get(str(record.baseline))
        for arm, cell in cells.items():
            if base is not None and cell is not base and (pair := paired_values(cell, base, measure.column)) is not None:
                yield point, arm, reweighted(pair, weights, clusters)


def paired_values(cell: Cell, other: Cell, column: str) -> Float[np.ndarray, "seeds questions"] | None:
    """The values of one cell minus those of another at the seeds that both have; one row where both are one run for all seeds.

    None where they share no seed.
    """
    shared = sorted(cell.seeds & other.seeds)
    if not shared:
        return None
    with np.errstate(invalid="ignore"):  # infinite minus infinite: no value, as it should be
        found = cell.values(column, shared) - other.values(column, shared)
    return np.where(np.isfinite(found), found, np.nan)


def compare(record: StudyRecord, procedure: Procedure = PROCEDURE) -> dict[tuple[str, Point, str], Comparison]:
    """Comparisons with the baseline by measure, grid point and arm; nothing where there is no baseline.

    An arm whose difference has no value (a question without a finite loss, runs that are missing) has no comparison, but counts
    as one in the correction of the others: what is missing makes nobody better.
    """
    if record.baseline is None:
        return {}
    planned_arm, planned_measure = None, None
    if record.primary is not None:
        planned_arm, planned_measure = record.primary["arm"], measure_of(record.primary["metric"]).name
    found: dict[tuple[str, Point, str], Comparison] = {}
    for name in record.kind.measures:
        effects = {(point, arm): procedure.test(d) for point, arm, d in differences(record, MEASURES[name])}
        for point in record.points:
            arms = [arm for arm in record.at(point) if arm != record.baseline]
            known = [effects.get((point, arm)) for arm in arms]
            known = [effect if effect is not None and np.isfinite(effect.mean) else None for effect in known]
            planned = np.array([(arm, name) == (planned_arm, planned_measure) for arm in arms], bool)
            alone = np.array([1.0 if effect is None else effect.p for effect in known], float)
            p = np.where(planned, alone, procedure.correct(np.where(planned, np.nan, alone)))
            for arm, effect, value, was_planned in zip(arms, known, p, planned, strict=True):
                if effect is not None:
                    found[name, point, arm] = Comparison(effect=effect, p=float(value), planned=bool(was_planned))
    return found
