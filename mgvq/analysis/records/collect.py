"""Collects the record of a study from the folders of its finished runs."""

import hashlib
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mgvq.analysis.records.recorded import Recorded
from mgvq.analysis.records.records import Cell, MissingRun, Point, RunRecord, StudyRecord, read_parquet, seeds_in_words
from mgvq.errors import UserError
from mgvq.evaluation.means import clusters_of
from mgvq.model.source import FLAG
from mgvq.runs.store import RunFolder
from mgvq.studies.kinds import Kind
from mgvq.studies.plan import PlannedRun
from mgvq.studies.spec import Study

FILES = ("config.yaml", "identity.json", "metrics.json", "samples.parquet")  # of a run folder, as far as records need it


def collect(study: Study, runs: Sequence[PlannedRun], *, partial: bool = False, recorded: Recorded | None = None) -> StudyRecord:
    """The record of a study, from run folders whose files are those that the runs wrote.

    Where a run is of a stress variant, or of a model whose revision may move, the points say so as their `model`, and so do all
    tables. A run without a good folder is taken from `recorded`, where that has it. `partial` leaves out the others that are not
    finished or whose files have changed, and names them in the record's cells; without it they raise UserError, by arm and seed.
    Raises UserError too where an evaluation is none that tables know, where runs answered different questions (their numbers do
    not belong into one table), and where no run at all is there.
    """
    cells = [_cell(planned, recorded) for planned in _by_cell(runs)]
    lacking = [(cell, missing) for cell in cells for missing in cell.missing]
    if lacking and not partial:
        raise UserError(f"{_told_missing(lacking, len(runs))} mgvq-study runs them; mgvq-report --partial tabulates the rest.")
    found = [run for cell in cells for run in cell.runs]
    if not found:
        raise UserError(f"study {study.name} has no finished run to tabulate: {_told_missing(lacking, len(runs))}")
    by_samples = {run.samples: run.run for run in found}
    if len(by_samples) > 1:
        raise UserError(f"the runs answered different test questions: {by_samples}")
    kind = _kind(runs[0])
    return StudyRecord(
        cells=tuple(_labelled(cells)),
        kind=kind,
        questions=_questions(found[0].run, runs, recorded, kind),
        baselines=tuple(study.baselines),
        baseline=next(iter(study.baselines), None),
        primary=study.primary,
        spread=study.spread,
        trainings=study.trainings,
    )


def _told_missing(lacking: Sequence[tuple[Cell, MissingRun]], total: int) -> str:
    """Which runs a study lacks and why: a line each."""
    lines = [
        f"\n  {cell.arm} ({cell.point.words}), {seeds_in_words(missing.seeds)}: {missing.reason}" for cell, missing in lacking
    ]
    return f"{sum(len(missing.seeds) for _, missing in lacking)} of {total} runs are missing:{''.join(lines)}\n"


def _by_cell(runs: Sequence[PlannedRun]) -> list[list[PlannedRun]]:
    """The planned runs of every cell, in the order of the study file."""
    cells: dict[tuple[str, str], list[PlannedRun]] = {}
    for run in runs:
        cells.setdefault((run.arm, json.dumps(run.point)), []).append(run)
    return list(cells.values())


def _cell(planned: Sequence[PlannedRun], recorded: Recorded | None) -> Cell:
    by_folder: dict[Path, list[PlannedRun]] = {}
    for run in planned:
        by_folder.setdefault(run.folder.path, []).append(run)
    runs, missing = [], []
    for same in by_folder.values():
        seeds = tuple(run.seed for run in same)
        if not (reason := _why_missing(same[0].folder)):
            runs.append(_run_record(same[0], seeds))
        elif recorded and (name := same[0].folder.path.name) in recorded:
            runs.append(replace(recorded.run(name), seeds=seeds, overrides=shlex.join(same[0].overrides)))
        else:
            missing.append(MissingRun(seeds=seeds, reason=reason))
    point = Point(json.dumps(planned[0].point))
    return Cell(point=point, arm=planned[0].arm, runs=tuple(runs), missing=tuple(missing))


def _why_missing(folder: RunFolder) -> str:
    """Why a run has no result that can be used; empty where it has one."""
    if folder.is_done():
        try:
            folder.verify(*FILES)
            folder.metrics()
        except UserError as error:
            return str(error)
        return ""
    failed = folder.path / "FAILED"
    if failed.is_file():
        lines = failed.read_text(errors="replace", encoding="utf-8").strip().splitlines() or ["no reason was written"]
        return f"failed: {lines[-1].removeprefix('mgvq.errors.UserError: ')}"
    return f"not finished: {folder.path} has no DONE" if folder.path.is_dir() else "not run"


def _run_record(run: PlannedRun, seeds: tuple[int, ...]) -> RunRecord:
    path = run.folder.path
    metrics, samples = run.folder.metrics(), _samples(path)
    kind = _kind(run)
    if kind.headline not in metrics:
        raise UserError(
            f"arm {run.arm}: tables are of runs that measured {kind.headline}; this one has {', '.join(sorted(metrics))}. "
            f"They are in {path}/metrics.json."
        )
    return RunRecord(
        run=path.name,
        seeds=seeds,
        overrides=shlex.join(run.overrides),
        num_samples=len(samples),
        samples=hashlib.sha256("".join(samples.sample_hash).encode()).hexdigest()[:16],
        metrics=_believable(metrics, samples, kind),
        identity=(path / "identity.json").read_text(encoding="utf-8"),
        scores=_scores(samples, kind),
        losses=samples.loss.round(3).to_numpy("float32") if "loss" in samples else None,
    )


def _kind(run: PlannedRun) -> Kind:
    if run.kind is None:
        raise UserError(f"arm {run.arm}: evaluation={run.cfg.variants.evaluation} declares no kind, so that no table knows it.")
    return run.kind


def _samples(run: Path) -> pd.DataFrame:
    return read_parquet(run / "samples.parquet", "delete the run's folder and run it again.")


def _believable(metrics: Mapping[str, Any], samples: pd.DataFrame, kind: Kind) -> dict[str, Any]:
    """The metrics, None for those that a question without a finite value belongs to: a sum that skips it is too good.

    Each of these columns of the samples becomes a flag.
    """
    metrics = {name: None if _is_no_number(value) else value for name, value in metrics.items()}
    columns = ["loss", "kl"] if "accuracy" not in kind.measures else ["loss", "kl", "score"]  # prose has no scores
    broken = [name for name in columns if name in samples and not np.isfinite(samples[name].to_numpy(float)).all()]
    if not broken:
        return metrics
    lost = {name for name in metrics if any(_MADE_OF[column](name) for column in broken)}
    flags = [*metrics["flags"], *(f"non_finite_samples:{column}" for column in broken)]
    return {**metrics, **dict.fromkeys(lost), "flags": flags}


def _is_no_number(value: Any) -> bool:
    return isinstance(value, float) and not np.isfinite(value)


# Which metrics are made of a column of the samples.
_MADE_OF: dict[str, Callable[[str], bool]] = {
    "loss": lambda name: name in ("loss/answer", "text/perplexity"),
    "kl": lambda name: name == "kl/full_precision",
    "score": lambda name: bool({"accuracy", "corrected", "raw"} & set(name.split("/"))),
}


def _scores(samples: pd.DataFrame, kind: Kind) -> np.ndarray:
    """Whether each answer is right; of benchmarks, some of whose scores lie between 0 and 1, or where one is NaN, the numbers."""
    unknown = "accuracy" in kind.measures and bool(samples.score.isna().any())
    if "loss" not in samples or unknown:
        return samples.score.to_numpy("float32")
    return (samples.score > 0).to_numpy()


def _questions(name: str, runs: Sequence[PlannedRun], recorded: Recorded | None, kind: Kind) -> pd.DataFrame:
    """What the run of that name answered, from its folder, or where that is gone from a record."""
    folder = next(run.folder for run in runs if run.folder.path.name == name)
    if recorded and name in recorded and _why_missing(folder):
        return recorded.questions(name)
    return _described(_samples(folder.path), kind)


def _described(samples: pd.DataFrame, kind: Kind) -> pd.DataFrame:
    """A row a question: its type and the tokens of its answer, or its task where there is no loss; and the number of its image
    or topic (`clusters_of`)."""
    clusters, _ = pd.factorize(clusters_of(samples.sample_id, kind.clusters))
    known = {"type": samples.type, "num_tokens": samples.num_tokens} if "loss" in samples else {"task": samples.task}
    return pd.DataFrame({**known, "picture": clusters})


def _labelled(cells: Sequence[Cell]) -> Iterator[Cell]:
    """The cells as they are where no run has a flag about its model; otherwise each point with a label of all its models."""
    labels: dict[Point, dict[str, None]] = {}
    marked = False
    for cell in cells:
        for run in cell.runs:
            marks = [flag.removeprefix(FLAG) for flag in run.metrics["flags"] if flag.startswith(FLAG)]
            marked = marked or bool(marks)
            name = json.loads(run.identity).get("model", {}).get("name", "model")
            labels.setdefault(cell.point, {})[f"{name} ({', '.join(marks)})" if marks else name] = None
    for cell in cells:
        if marked and cell.point in labels:
            values = {**cell.point.values, "model": " / ".join(labels[cell.point])}
            yield replace(cell, point=Point(json.dumps(values)))
        else:
            yield cell
