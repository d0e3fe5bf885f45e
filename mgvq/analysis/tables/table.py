"""The numbers of a study's table: a row an arm and grid point, with the comparison to the baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mgvq.analysis.records.records import Cell, MissingRun, Point, StudyRecord
from mgvq.analysis.statistics.compare import Comparison, compare
from mgvq.analysis.statistics.measures import ACCURACY, LOSS, Measure
from mgvq.model.source import FLAG


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A metric as a column of the table."""

    metric: str
    """Its name in `metrics.json`."""
    factor: int
    """The number that it is multiplied by before it is shown."""
    decimals: int
    """How many digits are shown after the point."""
    better: str | None = None
    """`max` or `min` where the best arm is of interest."""
    measure: Measure | None = None
    """What it is compared by with the baseline."""


def _measured(metric: str, measure: Measure) -> Column:
    return Column(metric=metric, factor=measure.factor, decimals=measure.decimals, better=measure.better, measure=measure)


# The columns of all studies, by their headings. A study shows those that its runs have measured; a new one is a line here.
COLUMNS = {
    "accuracy %": _measured("", ACCURACY),  # of the headline, which each evaluation has its own name for
    "perplexity": Column(metric="text/perplexity", factor=1, decimals=2, better="min"),
    "corrected %": Column(metric="suite/corrected", factor=100, decimals=1),
    "unparsed %": Column(metric="suite/unparsed", factor=100, decimals=1),
    "loss": _measured("loss/answer", LOSS),
    "KL": Column(metric="kl/full_precision", factor=1, decimals=3, better="min"),
    "bits, layers": Column(metric="bits/quantized_layers", factor=1, decimals=3),
    "bits, model": Column(metric="bits/model", factor=1, decimals=2),
    "quantise s": Column(metric="time/quantize_s", factor=1, decimals=1),
    "tune s": Column(metric="time/tune_s", factor=1, decimals=1),
    "tokens tuned": Column(metric="tuning/tokens", factor=1, decimals=0),
    "evaluate s": Column(metric="time/evaluate_s", factor=1, decimals=1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One arm at one grid point."""

    point: Point
    """The grid point."""
    arm: str
    """The arm's name."""
    values: Mapping[str, np.ndarray]
    """The metric of every run times the column's factor, by column; NaN where a run has none that is finite."""
    comparisons: Mapping[str, Comparison]
    """The difference to the baseline, by column. The baseline has none, and no arm has one where either lacks a value."""
    gap_closed: float | None
    """How much, in percent, of the baseline's loss above full precision the arm avoids. None where the point has no
    full-precision arm or the baseline loses nothing, for those two themselves, and where a loss is missing."""
    full_precision: bool
    """Whether the arm quantised nothing."""
    runs: tuple[str, ...]
    """The ids of its runs."""
    commands: tuple[str, ...]
    """The command of every run."""
    flags: int
    """How many fallbacks the runs took."""
    lacking: Mapping[str, tuple[int, ...]]
    """The seeds whose runs have no finite value, by column. Such a column has no mean."""
    missing: tuple[MissingRun, ...]
    """Runs that are not there: the row is of the others."""

    def mean(self, column: str) -> float:
        """The mean over the runs; NaN where one of them has no value, and without runs."""
        values = self.values[column]
        return float(np.mean(values)) if len(values) else np.nan

    def sd(self, column: str) -> float | None:
        """The standard deviation over the runs, None for a single one."""
        values = self.values[column]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


def columns_of(record: StudyRecord) -> dict[str, Column]:
    """The columns that the runs have measured: those of `COLUMNS`, and for benchmarks the accuracy of every task."""
    metrics = dict.fromkeys(name for run in record.runs for name in run.metrics)
    accuracy = replace(COLUMNS["accuracy %"], metric=record.kind.headline)
    columns = {"accuracy %": accuracy} if "accuracy" in record.kind.measures else {}
    if record.kind.by_task:
        tasks = [name.removesuffix("/raw") for name in metrics if name.endswith("/raw")]
        columns |= {f"{task} %": replace(accuracy, metric=f"{task}/accuracy", measure=None) for task in tasks}
    columns |= {name: column for name, column in COLUMNS.items() if name != "accuracy %"}
    return {name: column for name, column in columns.items() if column.metric in metrics}


def seeds_compared(table: Sequence[Row]) -> set[int]:
    """Over how many seeds the comparisons of a table are."""
    return {found.effect.num_seeds for row in table for found in row.comparisons.values()}


def column_of(measure: Measure) -> str:
    """The heading under which a measure stands."""
    return next(name for name, column in COLUMNS.items() if column.measure is measure)


def rows(record: StudyRecord) -> list[Row]:
    """The rows of the table, in the order of the study file."""
    comparisons, columns = compare(record), columns_of(record)
    table: list[Row] = []
    for point in record.points:
        cells = record.at(point)
        gaps = _gaps_closed(cells, record.baseline) if "loss" in columns else {}
        for arm, cell in cells.items():
            values = {name: cell.metric(c.metric) * c.factor for name, c in columns.items()}
            table.append(
                Row(
                    point=point,
                    arm=arm,
                    values=values,
                    comparisons=_compared(columns, comparisons, point, arm),
                    gap_closed=gaps.get(arm),
                    full_precision=cell.is_full_precision,
                    runs=tuple(run.run for run in cell.runs),
                    commands=tuple(f"mgvq-run {run.overrides}" for run in cell.runs),
                    flags=sum(not flag.startswith(FLAG) for run in cell.runs for flag in run.metrics["flags"]),
                    lacking=_lacking(cell, values),
                    missing=cell.missing,
                )
            )
    return table


def _compared(
    columns: Mapping[str, Column], comparisons: Mapping[tuple[str, Point, str], Comparison], point: Point, arm: str
) -> dict[str, Comparison]:
    keys = {name: (column.measure.name, point, arm) for name, column in columns.items() if column.measure}
    return {name: comparisons[key] for name, key in keys.items() if key in comparisons}


def _lacking(cell: Cell, values: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """The seeds without a value, by column."""
    seeds = {
        name: tuple(seed for run, value in zip(cell.runs, found, strict=True) if not np.isfinite(value) for seed in run.seeds)
        for name, found in values.items()
    }
    return {name: without for name, without in seeds.items() if without}


def _gaps_closed(cells: Mapping[str, Cell], baseline: str | None) -> dict[str, float]:
    """The value of `Row.gap_closed` for every arm that has one."""
    full = [arm for arm, cell in cells.items() if cell.is_full_precision]
    if baseline is None or baseline not in cells or len(full) != 1:
        return {}
    losses = {arm: float(cell.metric("loss/answer").mean()) if cell.runs else np.nan for arm, cell in cells.items()}
    low, high = losses[full[0]], losses[baseline]
    if not low < high < np.inf:  # also where one of them is missing
        return {}
    others = [arm for arm in cells if arm not in (baseline, full[0]) and np.isfinite(losses[arm])]
    return {arm: 100 * (high - losses[arm]) / (high - low) for arm in others}


def shown_p(p: float) -> str:
    """A p value with three digits, as every table has it."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"
