"""Where the spread between seeds comes from: the arms of a study that draw one thing anew each, beside the arm that draws all."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from mgvq.analysis.records.records import Point, StudyRecord
from mgvq.analysis.statistics.measures import MEASURES
from mgvq.analysis.statistics.significance import reweighted, variance_components
from mgvq.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Standard deviations of one metric of one arm, in the metric's unit; NaN where a question has no finite value."""

    runs: float
    """The standard deviation between the runs' figures on the shared questions."""
    low: float
    """The lower end of the chi-square interval of `runs`."""
    high: float
    """The upper end of that interval."""
    seeds: float
    """What of `runs` would stay with any number of questions: the seeds' component of the two-way table."""
    questions: float
    """What drawing the test questions anew would add."""
    num_runs: int
    """How many runs there are."""


def spreads(record: StudyRecord) -> dict[tuple[str, Point, str], Spread]:
    """The spread of every arm by measure, grid point and arm.

    Arms of a partial record that have fewer than two runs are left out. Raises UserError for an arm of one run, which has no
    spread.
    """
    clusters = record.questions.picture.to_numpy()
    found = {}
    for name in record.kind.measures:
        measure = MEASURES[name]
        weights = measure.weigh(record.questions, record.kind)
        for cell in record.cells:
            if len(cell.runs) < 2 and cell.missing:
                continue
            if len(cell.runs) < 2:
                raise UserError(
                    f"arm {cell.arm} is one run for all seeds: it has no spread. Leave it out of a study with `spread`."
                )
            found[name, cell.point, cell.arm] = _spread(reweighted(cell.values(measure.column), weights, clusters))
    return found


def _spread(values: Float[np.ndarray, "seeds clusters"]) -> Spread:
    seeds, samples = values.shape
    if not np.isfinite(values).all():
        return Spread(runs=np.nan, low=np.nan, high=np.nan, seeds=np.nan, questions=np.nan, num_runs=seeds)
    sd = float(np.std(values.mean(1), ddof=1))
    low, high = (sd * np.sqrt((seeds - 1) / stats.chi2.ppf(q, seeds - 1)) for q in (0.975, 0.025))
    if samples == 1:  # what is the questions' share of it cannot be told
        return Spread(runs=sd, low=float(low), high=float(high), seeds=np.nan, questions=np.nan, num_runs=seeds)
    components = variance_components(values)
    of_questions = np.sqrt((components.sample + components.residual) / samples)
    return Spread(
        runs=sd, low=float(low), high=float(high), seeds=components.seed**0.5, questions=float(of_questions), num_runs=seeds
    )
