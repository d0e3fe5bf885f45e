"""Is a result one of the model's weights or of the method? One model trained from several seeds, each quantised from several.

A figure of an arm is y[m, s] = mean + training_m + seed_ms, both random, on questions that all runs share. The mean has its
interval over trainings: the claim is about a model that was trained again. The two variances are those of the one-way analysis
(Searle, Casella and McCulloch 1992, chapter 3), and whether trainings differ at all is its F test.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from mgvq.analysis.records.records import questions, values_by_seed
from mgvq.analysis.statistics.compare import MEASURES, kind_of
from mgvq.analysis.tables.table import Column, columns_of, is_full_precision, shown_p

HEADER = ("figure", "arm", "mean", "95 % interval", "each training", "sd of trainings", "sd of seeds", "% trainings", "p")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A figure's mean over trainings and its standard deviations, in the metric's unit.

    `low` to `high`: where the mean over any number of trainings lies, 95 times of 100 (t, one degree of freedom less than there
    are trainings). `trainings` and `seeds`: the two components, the first 0 where its estimate is negative. `share`: the
    trainings' part of their joint variance. `p`: of "the trainings do not differ". The last three are None for one run a
    training.
    """

    means: tuple[float, ...]
    low: float
    high: float
    trainings: float
    seeds: float | None
    share: float | None
    p: float | None

    @property
    def mean(self) -> float:
        return float(np.mean(self.means))


def split(values: Float[np.ndarray, "trainings seeds"]) -> Split:
    """Raises ValueError for fewer than two trainings."""
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


def splits(records: pd.DataFrame) -> Iterator[tuple[str, str, str, Split]]:
    """Measure, what it is held against (nothing, full precision or the baseline; empty: nothing), arm, and the figure.

    Differences are taken within a training, at equal seeds.
    """
    full = next(
        (str(arm) for arm, part in records.groupby("arm") if is_full_precision(list(map(json.loads, part.metrics)))), None
    )
    for measure in kind_of(records).measures:
        found = _values(records, measure)
        for other in dict.fromkeys(("", full, records.attrs.get("baseline"))):
            if other is None:
                continue
            for arm, values in found.items():
                if arm != other and not (other and arm == full):
                    yield measure, other, arm, split(values - found[other] if other else values)


def _values(records: pd.DataFrame, measure: str) -> Mapping[str, Float[np.ndarray, "trainings seeds"]]:
    """The metric of every run, by arm; one seed where all seeds are one run."""
    column, weigh = MEASURES[measure]
    weights = weigh(questions(records))
    return {
        str(arm): np.stack([values_by_seed(runs, column) @ weights for _, runs in part.groupby("point", sort=False)])
        for arm, part in records.groupby("arm", sort=False)
    }


def plain(records: pd.DataFrame) -> str:
    """CSV of the bare numbers in the metrics' own units, a row a figure and arm."""
    lines = [
        {"measure": measure, "minus": other, "arm": arm, "mean": found.mean, **asdict(found)}
        for measure, other, arm, found in splits(records)
    ]
    for line in lines:
        line["means"] = " ".join(f"{mean:.6g}" for mean in line["means"])
    return pd.DataFrame(lines).to_csv(index=False, float_format="%.6g", lineterminator="\n")


def printable(records: pd.DataFrame) -> list[list[str]]:
    """Header and cells, a row a figure and arm."""
    columns = {c.measure: (name, c) for name, c in columns_of(records).items() if c.measure}
    lines = []
    for measure, other, arm, found in splits(records):
        name, column = columns[measure]
        lines.append([f"{name} - {other}" if other else name, arm, *_cells(found, column, signed=bool(other))])
    return [list(HEADER), *lines]


def _cells(found: Split, column: Column, *, signed: bool) -> list[str]:
    def shown(value: float, more: int = 0) -> str:
        return f"{value * column.factor:{'+' if signed and not more else ''}.{column.decimals + more}f}"

    each = ", ".join(map(shown, found.means))
    cells = [shown(found.mean), f"[{shown(found.low)}, {shown(found.high)}]", each, shown(found.trainings, 1)]
    if found.seeds is None or found.share is None or found.p is None:
        return [*cells, "-", "-", "-"]
    return [*cells, shown(found.seeds, 1), f"{100 * found.share:.0f}", shown_p(found.p)]


def note(records: pd.DataFrame) -> str:
    """What the columns are."""
    key = records.attrs["trainings"]
    trainings = [str(json.loads(point)[key]) for point in records.point.unique()]
    seeds = len({seed for seeds in records.seeds for seed in seeds})
    return (
        f"Trainings: {', '.join(trainings)}; {seeds} seeds of the quantiser each, {records.num_samples.iloc[0]:,} questions "
        "shared by all runs. Accuracy in points, loss in nats a token; differences within a training at equal seeds. Mean: over "
        "trainings, with its 95 % interval for trainings at large (t over the trainings' means). Sd of trainings and of seeds: "
        "the two components of the one-way random-effects analysis; % trainings: the first one's part of their variance. p: of "
        'the F test of "the trainings do not differ". An arm in which nothing is random has one run a training, and its sd is '
        "that of the runs."
    )
