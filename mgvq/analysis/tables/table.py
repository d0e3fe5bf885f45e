"""The numbers of a study's table: a row an arm and grid point, with the comparison to the baseline."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from mgvq.analysis.statistics.compare import Comparison, compare, kind_of
from mgvq.model.source import FLAG


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A metric times `factor`, with `decimals` digits; `better` (max | min) where the best arm is of interest.

    `measure` is the name under which it is compared with the baseline.
    """

    metric: str
    factor: int
    decimals: int
    better: str | None = None
    measure: str | None = None


COLUMNS = {
    "accuracy %": Column(metric="tiny_vqa/accuracy", factor=100, decimals=1, better="max", measure="accuracy"),
    "perplexity": Column(metric="text/perplexity", factor=1, decimals=2, better="min"),
    "corrected %": Column(metric="suite/corrected", factor=100, decimals=1),
    "unparsed %": Column(metric="suite/unparsed", factor=100, decimals=1),
    "loss": Column(metric="loss/answer", factor=1, decimals=3, better="min", measure="loss"),
    "KL": Column(metric="kl/full_precision", factor=1, decimals=3, better="min"),
    "bits, layers": Column(metric="bits/quantized_layers", factor=1, decimals=3),
    "bits, model": Column(metric="bits/model", factor=1, decimals=2),
    "quantise s": Column(metric="time/quantize_s", factor=1, decimals=1),
    "evaluate s": Column(metric="time/evaluate_s", factor=1, decimals=1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One arm at one grid point: its runs' values, times their factor, by those columns that the study has.

    `gap_closed`: how much, in percent, of the baseline's loss above full precision the arm avoids; None where the point has no
    full-precision arm or the baseline loses nothing, and for those two themselves.
    """

    point: dict[str, Any]
    arm: str
    values: dict[str, list[float]]
    comparisons: dict[str, Comparison]  # by column; the baseline has none
    gap_closed: float | None
    full_precision: bool
    runs: tuple[str, ...]
    commands: tuple[str, ...]
    flags: int  # fallbacks that the runs took

    def mean(self, column: str) -> float:
        return float(np.mean(self.values[column]))

    def sd(self, column: str) -> float | None:
        values = self.values[column]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


def columns_of(records: pd.DataFrame) -> dict[str, Column]:
    """Those of `COLUMNS` that the runs have measured, and the accuracy of every task where samples belong to several."""
    kind, metrics = kind_of(records), json.loads(records.metrics.iloc[0])
    columns = dict(COLUMNS)
    if "accuracy" in kind.measures:
        columns["accuracy %"] = replace(columns["accuracy %"], metric=kind.headline)
    if kind.by_task:
        accuracy = columns.pop("accuracy %")
        tasks = {f"{task} %": replace(accuracy, metric=f"{task}/accuracy", measure=None) for task in _tasks(metrics)}
        columns = {"accuracy %": accuracy, **tasks, **columns}
    return {name: column for name, column in columns.items() if column.metric in metrics}


def _tasks(metrics: Mapping[str, Any]) -> list[str]:
    """The benchmarks that a run answered, in its order."""
    return [name.removesuffix("/raw") for name in metrics if name.endswith("/raw")]


def rows(records: pd.DataFrame) -> list[Row]:
    """In the order of the study file."""
    comparisons, columns = compare(records), columns_of(records)
    baseline = records.attrs.get("baseline")
    table: list[Row] = []
    for point, at_point in records.groupby("point", sort=False):
        metrics = {str(arm): [json.loads(text) for text in part.metrics] for arm, part in at_point.groupby("arm", sort=False)}
        gaps = _gaps_closed(metrics, baseline) if "loss" in columns else {}
        for arm, found in metrics.items():
            mine = at_point[at_point["arm"] == arm]
            compared = {name: comparisons.get((str(c.measure), str(point), arm)) for name, c in columns.items()}
            table.append(
                Row(
                    point={key.rsplit(".", 1)[-1]: value for key, value in json.loads(str(point)).items()},
                    arm=arm,
                    values={name: list(_numbers(found, c.metric) * c.factor) for name, c in columns.items()},
                    comparisons={name: comparison for name, comparison in compared.items() if comparison},
                    gap_closed=gaps.get(arm),
                    full_precision=is_full_precision(found),
                    runs=tuple(mine["run"]),
                    commands=tuple(f"mgvq-run {overrides}" for overrides in mine["overrides"]),
                    flags=sum(not flag.startswith(FLAG) for m in found for flag in m["flags"]),
                )
            )
    return table


def _gaps_closed(metrics: dict[str, list[dict[str, Any]]], baseline: str | None) -> dict[str, float]:
    """By arm; see `Row.gap_closed`."""
    full = [arm for arm, found in metrics.items() if is_full_precision(found)]
    if baseline is None or len(full) != 1:
        return {}
    low, high = _loss(metrics[full[0]]), _loss(metrics[baseline])
    others = [arm for arm in metrics if arm not in (baseline, full[0])]
    return {arm: 100 * (high - _loss(metrics[arm])) / (high - low) for arm in others} if low < high else {}


def shown_p(p: float) -> str:
    """Three digits, as every table has it."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _loss(found: Sequence[dict[str, Any]]) -> float:
    return _numbers(found, "loss/answer").mean()


def is_full_precision(found: Sequence[dict[str, Any]]) -> bool:
    """Whether these are the metrics of runs that quantised nothing."""
    return all(m["rate"] == "full_precision" for m in found)


def _numbers(found: Sequence[dict[str, Any]], metric: str) -> np.ndarray:
    """NaN for a metric that was not finite, which the run's file keeps as null."""
    return np.array([m[metric] for m in found], float)
