"""The compact record of a study: one row a distinct run, enough to rebuild every table without the run folders."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mgvq.errors import UserError
from mgvq.studies.plan import PlannedRun, distinct


def collect(runs: Sequence[PlannedRun]) -> pd.DataFrame:
    """Columns: `run, arm, point, seed, overrides, num_samples, samples, metrics`; the structured ones as JSON text.

    `samples` is a digest of the questions that were answered. Raises UserError where a run is not done, or where runs answered
    different questions: their numbers do not belong into one table.
    """
    records = pd.DataFrame([_record(run) for run in distinct(runs)])
    if records.samples.nunique() > 1:
        raise UserError(f"the runs answered different test questions: {records.groupby('samples').run.first().to_dict()}")
    return records


def _record(run: PlannedRun) -> dict[str, object]:
    metrics = run.folder.metrics()
    samples = pd.read_parquet(run.folder.path / "samples.parquet", columns=["sample_hash"]).sample_hash
    return {
        "run": run.folder.path.name,
        "arm": run.arm,
        "point": json.dumps(run.point),
        "seed": run.seed,
        "overrides": " ".join(run.overrides),
        "num_samples": len(samples),
        "samples": f"{pd.util.hash_pandas_object(samples, index=False).sum():016x}",
        "metrics": json.dumps(metrics),
    }


def read_records(path: Path) -> pd.DataFrame:
    """Raises UserError where there is no such file."""
    if not path.is_file():
        raise UserError(f"{path} is missing; mgvq-report STUDY.yaml writes it from finished runs.")
    return pd.read_parquet(path)


def metric_frame(records: pd.DataFrame) -> pd.DataFrame:
    """Records with a column for each grid key and each metric, and `points`, the grid keys' names."""
    rows = [
        {**json.loads(r.point), "arm": r.arm, "seed": r.seed, "run": r.run, **json.loads(r.metrics)} for r in records.itertuples()
    ]
    frame = pd.DataFrame(rows)
    frame.attrs["points"] = list(json.loads(records.point.iloc[0]))
    return frame
