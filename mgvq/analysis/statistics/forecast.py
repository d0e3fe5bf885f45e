"""What a study will take and what it can find, before its first run."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

from mgvq.analysis.records.records import questions, read_records
from mgvq.analysis.statistics.compare import differences, kind_of
from mgvq.analysis.statistics.significance import Components, smallest_difference, variance_components
from mgvq.studies.kinds import Kind
from mgvq.studies.plan import PlannedRun, distinct
from mgvq.studies.spec import Study

_START_S = 10  # imports and loading the model, which no metric counts
_ASSUMED = {  # as found between random arms on the small models, roughly
    "accuracy": Components(seed=0.01**2, sample=0.2**2, residual=0.17**2),
    "loss": Components(seed=0.004**2, sample=0.15**2, residual=0.1**2),
}
_ASSUMED_OF = "tiny_vqa/accuracy"  # the headline of the runs that the assumption is about
_ASSUMED_QUESTIONS, _ASSUMED_NUMBER = 4.0, 1000  # of a picture, and in all
_UNITS = {"accuracy": (100, "points of accuracy", 1), "loss": (1, "nats a token", 3)}


def predicted_seconds(runs: Sequence[PlannedRun], jobs: int) -> float | None:
    """Of the missing runs, `jobs` side by side; None while no run at all has finished in this results folder.

    A run takes the median time of the finished runs of its arm; without one of the study's, without these of the folder's.
    """
    once = distinct(runs)
    done, missing = [r for r in once if r.folder.is_done()], [r for r in once if not r.folder.is_done()]
    by_arm: dict[str, list[float]] = {}
    for run in done:
        by_arm.setdefault(run.arm, []).append(_seconds(run.folder.path))
    others = [s for times in by_arm.values() for s in times]
    others = others or [_seconds(mark.parent) for mark in once[0].folder.path.parent.glob("*/DONE")]
    if not others:
        return None
    return sum(statistics.median(by_arm.get(run.arm, others)) for run in missing) / min(jobs, max(1, len(missing)))


def _seconds(folder: Path) -> float:
    metrics = json.loads((folder / "metrics.json").read_text())
    return _START_S + sum(value for name, value in metrics.items() if name.startswith("time/"))


def detectable(study: Study, runs: Sequence[PlannedRun], records: Path) -> str:
    """The smallest differences that the study finds four times in five, and where the spread that they rest on comes from.

    That is the study's own record in the folder `records`, else the first of another study of its kind with a baseline, else,
    for the small models' questions, an assumption.
    """
    num_arms, kind = len(study.arms) - 1, runs[0].kind
    if not study.baselines or not num_arms:
        return "compares nothing: it has no baseline, or no other arm"
    spread = _spread(study, records, kind) if kind else None
    if kind is None or spread is None:
        return "finds what its first runs will tell: no study with its evaluation has a record of the spread yet"
    components, per_picture, num_samples, source = spread
    num_pictures = max(2, round((runs[0].num_samples or num_samples) / per_picture))
    found = []
    for measure in components:
        factor, unit, decimals = _UNITS[measure]
        smallest = smallest_difference(
            components[measure], num_seeds=study.least_seeds, num_samples=num_pictures, num_tests=num_arms
        )
        found.append(f"{smallest * factor:.{decimals}f} {unit}")
    design = f"{study.least_seeds} seeds x {num_pictures} {kind.clusters}, Holm over {num_arms} arm{'s' * (num_arms > 1)}"
    return f"finds differences of {' and '.join(found)} with 80 % power ({design}; spread {source})"


def _spread(study: Study, folder: Path, kind: Kind) -> tuple[dict[str, Components], float, int, str] | None:
    """Components by measure, questions of a picture, their number, and where from. Of the median arm, over all grid points."""
    own = folder / f"{study.name}.parquet"
    for path in [own, *sorted(p for p in folder.glob("*.parquet") if p != own)]:
        records = read_records(path) if path.is_file() else None
        if records is None or records.attrs.get("baseline") is None or kind_of(records) != kind:
            continue
        random = {m: [variance_components(d) for _, _, d in differences(records, m) if len(d) > 1] for m in kind.measures}
        if all(random.values()):
            asked = questions(records)
            components = {m: _median(found) for m, found in random.items()}
            return components, len(asked) / asked.picture.nunique(), len(asked), f"of {path.stem}"
    return (_ASSUMED, _ASSUMED_QUESTIONS, _ASSUMED_NUMBER, "assumed") if kind.headline == _ASSUMED_OF else None


def _median(components: Sequence[Components]) -> Components:
    return Components(**{f.name: float(np.median([getattr(c, f.name) for c in components])) for f in fields(Components)})
