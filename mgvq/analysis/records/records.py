"""The compact record of a study: one row a cell and distinct run, enough to rebuild every table without the run folders."""

import hashlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from mgvq.errors import UserError
from mgvq.model.source import FLAG
from mgvq.studies.plan import PlannedRun
from mgvq.studies.spec import Study


def collect(study: Study, runs: Sequence[PlannedRun]) -> pd.DataFrame:
    """Columns: `run, arm, point, seeds, overrides, num_samples, samples, metrics, identity, scores, losses`.

    `point`, `metrics` and `identity` are JSON text. Where a run is of a stress variant, or of a model whose revision may move,
    the points say so as their `model`, and so do all tables. `seeds` are all that the run stands for, `overrides` the command's
    words at the first of them; `scores` and rounded `losses` (none of benchmarks) are lists with an entry a question; `samples`
    is a digest of the questions. What the rows have in common is in the `attrs`, which the parquet file keeps: the study's
    `baseline` (the first of its `baselines`), `primary`, `spread` and `trainings`, the `kind` of its evaluation, and what
    `questions` reads. Raises UserError where a run is not done, where an evaluation is none that tables know, or where runs
    answered different questions: their numbers do not belong into one table.
    """
    cells: dict[tuple[str, str, Path], list[PlannedRun]] = {}
    for run in runs:
        cells.setdefault((run.arm, json.dumps(run.point), run.folder.path), []).append(run)
    records = pd.DataFrame([_record(cell) for cell in cells.values()])
    if records.samples.nunique() > 1:
        raise UserError(f"the runs answered different test questions: {records.groupby('samples').run.first().to_dict()}")
    records["point"] = records.point.map(_labelled_points(records))
    baseline = next(iter(study.baselines), None)
    common = {name: getattr(study, name) for name in ("baselines", "primary", "spread", "trainings")}
    kind = runs[0].kind
    assert kind is not None, "each of the records has been asked for it"
    records.attrs = {"baseline": baseline, **common, "kind": kind.settings(), "questions": _describe(_samples(runs[0]))}
    return records


def _labelled_points(records: pd.DataFrame) -> dict[str, str]:
    """The points as they are where no run has a flag about its model; otherwise each with a label of all its models."""
    marks = [[f.removeprefix(FLAG) for f in json.loads(text)["flags"] if f.startswith(FLAG)] for text in records.metrics]
    if not any(marks):
        return {point: point for point in records.point}
    labels: dict[str, dict[str, None]] = {}
    for point, identity, mark in zip(records.point, records.identity, marks, strict=True):
        name = json.loads(identity)["model"]["name"]
        labels.setdefault(point, {})[f"{name} ({', '.join(mark)})" if mark else name] = None
    return {point: json.dumps(json.loads(point) | {"model": " / ".join(found)}) for point, found in labels.items()}


def against(records: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """The same records with another baseline; the study's primary comparison is not one of these."""
    other = records.copy()
    other.attrs = {**records.attrs, "baseline": baseline, "primary": None}
    return other


def _record(cell: Sequence[PlannedRun]) -> dict[str, object]:
    run = cell[0]
    metrics, samples = run.folder.metrics(), _samples(run)
    if run.kind is None:
        raise UserError(f"arm {run.arm}: evaluation={run.cfg.variants.evaluation} declares no kind, so that no table knows it.")
    if run.kind.headline not in metrics:
        raise UserError(
            f"arm {run.arm}: tables are of runs that measured {run.kind.headline}; this one has {', '.join(sorted(metrics))}. "
            f"They are in {run.folder.path}/metrics.json."
        )
    return {
        "run": run.folder.path.name,
        "arm": run.arm,
        "point": json.dumps(run.point),
        "seeds": [planned.seed for planned in cell],
        "overrides": shlex.join(run.overrides),
        "num_samples": len(samples),
        "samples": hashlib.sha256("".join(samples.sample_hash).encode()).hexdigest()[:16],
        "metrics": json.dumps(metrics),
        "identity": (run.folder.path / "identity.json").read_text(),
        **_answers(samples),
    }


def _answers(samples: pd.DataFrame) -> dict[str, list[bool] | list[float]]:
    """Of benchmarks the scores alone, some of them between 0 and 1; else whether each answer is right, and its loss."""
    if "loss" not in samples:
        return {"scores": samples.score.astype("float32").to_list()}
    return {"scores": (samples.score > 0).to_list(), "losses": samples.loss.round(3).astype("float32").to_list()}


def _samples(run: PlannedRun) -> pd.DataFrame:
    return pd.read_parquet(run.folder.path / "samples.parquet")


def _describe(samples: pd.DataFrame) -> dict[str, str]:
    """A word a question: its type and the tokens of its answer, or its task where there is no loss; and its picture (a sample
    id without its last part)."""
    pictures, _ = pd.factorize(samples.sample_id.str.rpartition("-")[0])
    known = {"type": samples.type, "num_tokens": samples.num_tokens} if "loss" in samples else {"task": samples.task}
    columns = {**known, "picture": pictures}
    return {name: " ".join(map(str, column)) for name, column in columns.items()}


def questions(records: pd.DataFrame) -> pd.DataFrame:
    """One row a question: `type` and `num_tokens` of the right answer, or its `task`; and the number of its `picture`."""
    columns = {name: words.split() for name, words in records.attrs["questions"].items()}
    return pd.DataFrame(columns).astype({name: int for name in ("num_tokens", "picture") if name in columns})


def write_records(records: pd.DataFrame, path: Path) -> None:
    """One parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records.to_parquet(path, index=False, compression="zstd")


def read_records(path: Path) -> pd.DataFrame:
    """Raises UserError where there is no such file."""
    if not path.is_file():
        raise UserError(f"{path} is missing; mgvq-report STUDY.yaml writes it from finished runs.")
    return pd.read_parquet(path)


def metric_frame(records: pd.DataFrame) -> pd.DataFrame:
    """A row a record with a column for each grid key and each metric; `attrs["points"]` are the grid keys' names."""
    rows = [
        {**json.loads(row["point"]), "arm": row["arm"], "run": row["run"], **json.loads(row["metrics"])}
        for row in records.to_dict(orient="records")
    ]
    frame = pd.DataFrame(rows)
    frame.attrs["points"] = list(json.loads(records.point.iloc[0]))
    return frame


def values_by_seed(records: pd.DataFrame, column: str) -> np.ndarray:
    """`scores` or `losses` of one arm at one grid point: a row a seed in ascending order, or one if all seeds are one run."""
    if len(records) == 1:
        return np.array([records[column].iloc[0]], float)
    rows = {seed: row for seeds, row in zip(records.seeds, records[column], strict=True) for seed in seeds}
    return np.array([rows[seed] for seed in sorted(rows)], float)
