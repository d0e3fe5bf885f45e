"""The record of a study: its finished runs with a value for every question, enough to make every table without the run folders.

One parquet file a study, `results/records/STUDY.parquet`: a row for every run in every cell, and what the rows have in common in
the file's metadata. `StudyRecord` is what the analysis works on.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from mgvq.errors import UserError
from mgvq.studies.kinds import Kind, kind_from, kind_of_metrics

COLUMNS = ("run", "arm", "point", "seeds", "overrides", "num_samples", "samples", "metrics", "identity", "scores")


@dataclass(frozen=True)
class Point:
    """One combination of the values of a study's grid. Two points are equal where their texts are."""

    text: str
    """The grid's keys and values as JSON."""

    @cached_property
    def values(self) -> Mapping[str, Any]:
        """The grid's values by their full keys."""
        return json.loads(self.text)

    @cached_property
    def short(self) -> Mapping[str, Any]:
        """The grid's values by the last parts of their keys (`bits_per_weight`), as tables show them."""
        return {key.rsplit(".", 1)[-1]: value for key, value in self.values.items()}

    @property
    def words(self) -> str:
        """The point in a sentence: text values alone, others after their keys; `all runs` for a study without a grid."""
        return self.named(self.short) or "all runs"

    @staticmethod
    def named(values: Mapping[str, Any]) -> str:
        """Some of a point's values in words."""
        return ", ".join(str(v) if isinstance(v, str) else f"{k} {v}" for k, v in values.items())

    def title(self, separator: str = ", ") -> str:
        """The bare values, for a heading."""
        return separator.join(map(str, self.values.values()))


@dataclass(frozen=True, kw_only=True, eq=False)
class RunRecord:
    """One finished run in one cell of its study."""

    run: str
    """The run's id, the name of its folder."""
    seeds: tuple[int, ...]
    """All seeds that the run stands for; several where nothing in it is random."""
    overrides: str
    """The words of the command that makes the run at the first of its seeds."""
    num_samples: int
    """How many questions or passages the run answered."""
    samples: str
    """A digest of these questions."""
    metrics: Mapping[str, Any]
    """`metrics.json` of the run. A metric that was not finite is None."""
    identity: str
    """`identity.json` of the run, as it is written there."""
    scores: np.ndarray
    """The score of every answer: bool for right or wrong, else float32."""
    losses: np.ndarray | None
    """The loss of every right answer in nats, to three digits; None for benchmarks, which have none."""

    @property
    def is_full_precision(self) -> bool:
        """Whether the run quantised nothing."""
        return self.metrics["rate"] == "full_precision"

    def metric(self, name: str) -> float:
        """A metric of the run, NaN where it was not finite or not measured."""
        value = self.metrics.get(name)
        return float(value) if value is not None and np.isfinite(value) else np.nan


@dataclass(frozen=True, kw_only=True)
class MissingRun:
    """A run of the study that has no result, or none that can be trusted."""

    seeds: tuple[int, ...]
    """The seeds that it would stand for."""
    reason: str
    """What became of it: not run, failed with which error, damaged in which file."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """All runs of one arm at one point of the grid."""

    point: Point
    arm: str
    runs: tuple[RunRecord, ...]
    missing: tuple[MissingRun, ...] = ()

    @property
    def is_fixed(self) -> bool:
        """Whether one run stands for all seeds."""
        return len(self.runs) == 1 and not self.missing

    @property
    def is_full_precision(self) -> bool:
        """Whether all runs quantised nothing."""
        return bool(self.runs) and all(run.is_full_precision for run in self.runs)

    @property
    def seeds(self) -> set[int]:
        """The seeds that have a run."""
        return {seed for run in self.runs for seed in run.seeds}

    def metric(self, name: str) -> Float[np.ndarray, "runs"]:
        """One metric of all runs, NaN where it was not finite."""
        return np.array([run.metric(name) for run in self.runs], float)

    def values(self, column: str, seeds: Sequence[int] | None = None) -> Float[np.ndarray, "seeds questions"]:
        """`scores` or `losses`: a row for every seed in ascending order, one row where one run stands for all seeds.

        `seeds` chooses among the rows where there are several; each must have a run.
        """
        if self.is_fixed:
            return np.array([getattr(self.runs[0], column)], float)
        rows = {seed: getattr(run, column) for run in self.runs for seed in run.seeds}
        return np.array([rows[seed] for seed in sorted(rows if seeds is None else seeds)], float)


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyRecord:
    """The results of a study: what its tables, figures and verdict are made of."""

    cells: tuple[Cell, ...]
    """Every arm at every point that it is run at, in the order of the study file."""
    kind: Kind
    """What the runs answered, all of them the same."""
    questions: pd.DataFrame
    """One row a question. Columns: `type` and `num_tokens` of the right answer, or its `task` where there is no loss; `picture`,
    the number of the cluster that it belongs to."""
    baselines: tuple[str, ...] = ()
    """The arms that others are compared with: each makes a table."""
    baseline: str | None = None
    """The one of them that this record is compared with; None compares nothing."""
    primary: Mapping[str, str] | None = None
    """`arm` and `metric` of the one comparison that was planned before the first run."""
    spread: str | None = None
    """In a study of seeds, the arm that draws everything anew with each."""
    trainings: str | None = None
    """In a study of trainings, the key of the grid whose values are one model trained from several seeds."""

    @cached_property
    def runs(self) -> tuple[RunRecord, ...]:
        """All runs; one that belongs to several cells is here as often."""
        return tuple(run for cell in self.cells for run in cell.runs)

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """The points of the grid."""
        return tuple(dict.fromkeys(cell.point for cell in self.cells))

    @cached_property
    def arms(self) -> tuple[str, ...]:
        """The names of all arms."""
        return tuple(dict.fromkeys(cell.arm for cell in self.cells))

    def at(self, point: Point) -> dict[str, Cell]:
        """The cells of one point by arm."""
        return {cell.arm: cell for cell in self.cells if cell.point == point}

    @property
    def num_samples(self) -> int:
        """How many questions or passages every run answered."""
        return self.runs[0].num_samples

    @property
    def missing(self) -> list[tuple[Cell, MissingRun]]:
        """What a partial record lacks; empty for a complete one."""
        return [(cell, missing) for cell in self.cells for missing in cell.missing]

    def to_frame(self) -> pd.DataFrame:
        """A row a run with a column for each grid key, `arm`, `run`, and each metric; `melt` makes a row a metric of it."""
        return metric_frame(self)

    def against(self, baseline: str | None) -> "StudyRecord":
        """The same results with another baseline; the study's planned comparison is not one of these."""
        return replace(self, baseline=baseline, primary=None)


def seeds_in_words(seeds: Sequence[int]) -> str:
    """`seed 3`, or `seeds 0, 1`."""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def metric_frame(record: StudyRecord) -> pd.DataFrame:
    """A row a run with a column for each grid key, `arm`, `run`, and each metric."""
    return pd.DataFrame(
        {**cell.point.values, "arm": cell.arm, "run": run.run, **run.metrics} for cell in record.cells for run in cell.runs
    )


def write_record(record: StudyRecord, path: Path) -> None:
    """Write one parquet file. Raises UserError for a record from which runs are missing."""
    if record.missing:
        raise UserError(f"{path} is not written: a record of a study needs all its runs, and {len(record.missing)} are missing.")
    frame = pd.DataFrame(_lines(record))
    questions = {str(name): " ".join(map(str, column)) for name, column in record.questions.items()}
    frame.attrs = {
        "baseline": next(iter(record.baselines), None),
        "baselines": list(record.baselines),
        "primary": record.primary,
        "spread": record.spread,
        "trainings": record.trainings,
        "kind": record.kind.settings(),
        "questions": questions,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(path, index=False, compression="zstd")


def _lines(record: StudyRecord) -> Iterator[dict[str, object]]:
    exact = all(run.scores.dtype == bool for run in record.runs)  # a column has one type
    for cell in record.cells:
        for run in cell.runs:
            yield {
                "run": run.run,
                "arm": cell.arm,
                "point": cell.point.text,
                "seeds": list(run.seeds),
                "overrides": run.overrides,
                "num_samples": run.num_samples,
                "samples": run.samples,
                "metrics": json.dumps(run.metrics),
                "identity": run.identity,
                "scores": run.scores if exact else run.scores.astype("float32"),
                **({} if run.losses is None else {"losses": run.losses}),
            }


def read_record(path: str | Path) -> StudyRecord:
    """Read what `write_record` wrote; `mgvq.read_study` is this function.

    Raises UserError, naming the file, where it is missing, damaged or no record.
    """
    path = Path(path)
    frame = read_parquet(path, "mgvq-report STUDY.yaml writes it from finished runs.")
    told = frame.attrs
    if absent := [name for name in COLUMNS if name not in frame] + [name for name in ("questions",) if name not in told]:
        raise UserError(f"{path} is no record of a study: it has no {', '.join(absent)}. mgvq-report STUDY.yaml writes one.")
    try:
        cells = _cells(frame)
        kind = kind_from(told["kind"]) if told.get("kind") else kind_of_metrics(cells[0].runs[0].metrics)
        if not all(kind.headline in run.metrics for cell in cells for run in cell.runs):
            raise ValueError(f"a run in it has not measured {kind.headline}")
        return StudyRecord(
            cells=cells,
            kind=kind,
            questions=_questions(told["questions"]),
            baselines=tuple(told.get("baselines") or ()),
            baseline=told.get("baseline"),
            primary=told.get("primary"),
            spread=told.get("spread"),
            trainings=told.get("trainings"),
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no record of a study: {error}. mgvq-report STUDY.yaml writes one.") from error


def read_parquet(path: Path, remedy: str) -> pd.DataFrame:
    """A parquet file. Raises UserError with its name and the `remedy` where it is missing, empty, cut short or not parquet."""
    if not path.is_file():
        raise UserError(f"{path} is missing; {remedy}")
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError, KeyError) as error:  # ArrowInvalid is a ValueError
        raise UserError(f"{path} cannot be read as parquet ({_first_line(error)}); {remedy}") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _cells(frame: pd.DataFrame) -> tuple[Cell, ...]:
    found: dict[tuple[Point, str], list[RunRecord]] = {}
    for row in frame.to_dict(orient="records"):
        run = RunRecord(
            run=row["run"],
            seeds=tuple(map(int, row["seeds"])),
            overrides=row["overrides"],
            num_samples=int(row["num_samples"]),
            samples=row["samples"],
            metrics=json.loads(row["metrics"]),
            identity=row["identity"],
            scores=row["scores"],
            losses=row.get("losses"),
        )
        found.setdefault((Point(row["point"]), row["arm"]), []).append(run)
    if not found:
        raise ValueError("it has no runs")
    return tuple(Cell(point=point, arm=arm, runs=tuple(runs)) for (point, arm), runs in found.items())


def _questions(words: Mapping[str, str]) -> pd.DataFrame:
    columns = {name: text.split() for name, text in words.items()}
    return pd.DataFrame(columns).astype({name: int for name in ("num_tokens", "picture") if name in columns})
