"""The compact record of a study: one row a cell and distinct run, enough to rebuild every table without the run folders."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mgvq.errors import UserError
from mgvq.studies.plan import PlannedRun


def collect(runs: Sequence[PlannedRun]) -> pd.DataFrame:
    """Columns: `run, arm, point, seed, overrides, num_samples, samples, metrics, identity, scores, losses`.

    `point`, `metrics` and `identity` are JSON text; `scores` and rounded `losses` are lists with an entry a question; `samples`
    is a digest of the questions. Raises UserError where a run is not done, or where runs answered different questions: their
    numbers do not belong into one table.
    """
    cells = {(run.arm, json.dumps(run.point), run.folder.path): run for run in reversed(runs)}  # the first seed of each run
    records = pd.DataFrame([_record(run) for run in reversed(cells.values())])
    if records.samples.nunique() > 1:
        raise UserError(f"the runs answered different test questions: {records.groupby('samples').run.first().to_dict()}")
    return records


def _record(run: PlannedRun) -> dict[str, object]:
    metrics = run.folder.metrics()
    samples = pd.read_parquet(run.folder.path / "samples.parquet")
    return {
        "run": run.folder.path.name,
        "arm": run.arm,
        "point": json.dumps(run.point),
        "seed": run.seed,
        "overrides": " ".join(run.overrides),
        "num_samples": len(samples),
        "samples": hashlib.sha256("".join(samples.sample_hash).encode()).hexdigest()[:16],
        "metrics": json.dumps(metrics),
        "identity": (run.folder.path / "identity.json").read_text(),
        "scores": (samples.score > 0).to_list(),
        "losses": samples.loss.round(3).astype("float32").to_list(),
    }


def read_records(path: Path) -> pd.DataFrame:
    """Raises UserError where there is no such file."""
    if not path.is_file():
        raise UserError(f"{path} is missing; mgvq-report STUDY.yaml writes it from finished runs.")
    return pd.read_parquet(path)


def metric_frame(records: pd.DataFrame) -> pd.DataFrame:
    """Records with a column for each grid key and each metric, and `points`, the grid keys' names."""
    rows = [
        {**json.loads(row["point"]), "arm": row["arm"], "seed": row["seed"], "run": row["run"], **json.loads(row["metrics"])}
        for row in records.to_dict(orient="records")
    ]
    frame = pd.DataFrame(rows)
    frame.attrs["points"] = list(json.loads(records.point.iloc[0]))
    return frame
