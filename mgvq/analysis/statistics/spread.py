"""Where the spread between seeds comes from: the arms of a study that draw one thing anew each, beside the arm that draws all."""

import json
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from scipy import stats

from mgvq.analysis.records.records import questions, values_by_seed
from mgvq.analysis.statistics.compare import MEASURES, kind_of
from mgvq.analysis.statistics.significance import reweighted, variance_components
from mgvq.analysis.tables.table import columns_of
from mgvq.errors import UserError

HEADER = ("sd of runs", "95 % interval", "% of variance", "sd, any question", "sd of questions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Standard deviations of one metric of one arm, in the metric's unit.

    `runs`: between the runs' figures on the shared questions, with its chi-square interval from `low` to `high`. `seeds`: what
    of it would stay with any number of questions, the seeds' component of the two-way table. `questions`: what drawing the test
    questions anew would add. `num_runs`: how many runs there are.
    """

    runs: float
    low: float
    high: float
    seeds: float
    questions: float
    num_runs: int


def spreads(records: pd.DataFrame) -> dict[tuple[str, str, str], Spread]:
    """By measure, grid point (JSON text) and arm. Raises UserError for an arm of one run, which has no spread."""
    asked = questions(records)
    pictures = asked.picture.to_numpy()
    found = {}
    for measure in kind_of(records).measures:
        column, weigh = MEASURES[measure]
        for point, arm in dict.fromkeys(zip(records.point, records["arm"], strict=True)):
            rows = records.loc[(records.point == point) & (records["arm"] == arm)]
            if len(rows) < 2:
                raise UserError(f"arm {arm} is one run for all seeds: it has no spread. Leave it out of a study with `spread`.")
            values = reweighted(values_by_seed(rows, column), weigh(asked), pictures)
            found[measure, point, arm] = _spread(values)
    return found


def _spread(values: np.ndarray) -> Spread:
    seeds, samples = values.shape
    components = variance_components(values)
    sd = float(np.std(values.mean(1), ddof=1))
    low, high = (sd * np.sqrt((seeds - 1) / stats.chi2.ppf(q, seeds - 1)) for q in (0.975, 0.025))
    of_questions = np.sqrt((components.sample + components.residual) / samples)
    return Spread(
        runs=sd, low=float(low), high=float(high), seeds=components.seed**0.5, questions=float(of_questions), num_runs=seeds
    )


def plain(records: pd.DataFrame) -> str:
    """CSV of the bare numbers in the metrics' own units, a row a measure, grid point and arm."""
    lines = [{"measure": m, "point": p, "arm": a, **asdict(spread)} for (m, p, a), spread in spreads(records).items()]
    return pd.DataFrame(lines).to_csv(index=False, float_format="%.6g", lineterminator="\n")


def printable(records: pd.DataFrame) -> list[list[str]]:
    """Header and cells, a row an arm; the arm `records.attrs["spread"]` is the whole that the others are parts of."""
    found, whole = spreads(records), records.attrs["spread"]
    columns = {c.measure: (name, c.factor, c.decimals) for name, c in columns_of(records).items() if c.measure}
    header = ["point", "arm", *(f"{name}: {part}" for name, _, _ in columns.values() for part in HEADER), "runs"]
    lines = []
    for point, arm in dict.fromkeys((point, arm) for _, point, arm in found):
        cells = [point, arm]
        for measure, (_, factor, decimals) in columns.items():
            mine, all_of_it = found[str(measure), point, arm], found[str(measure), point, whole]
            sds = [f"{sd * factor:.{decimals + 1}f}" for sd in (mine.runs, mine.low, mine.high, mine.seeds, mine.questions)]
            share = 100 * (mine.runs / all_of_it.runs) ** 2 if all_of_it.runs else float("nan")
            cells += [sds[0], f"[{sds[1]}, {sds[2]}]", f"{share:.0f}", sds[3], sds[4]]
        lines.append([*cells, str(found["loss", point, arm].num_runs)])
    if len({line[0] for line in lines}) == 1:
        return [line[1:] for line in (header, *lines)]
    return [header, *lines]


def note(records: pd.DataFrame) -> str:
    """What the columns are."""
    points = records.point.unique()
    words = (f"{key} {value}" for key, value in json.loads(points[0]).items())
    only = f" All rows: {', '.join(words)}." if len(points) == 1 else ""
    return (
        "Standard deviations, accuracy in points, loss in nats a token. Sd of runs: between runs that answer the same "
        f"{records.num_samples.iloc[0]:,} questions, with its chi-square interval. % of variance: its square over that of "
        f'"{records.attrs["spread"]}"; parts whose draws interact need not add up to 100. Sd, any question: what would stay '
        "of it if there were no end of questions (0 where the estimate is not above 0). Sd of questions: what drawing the test "
        f"questions anew would add.{only}"
    )
