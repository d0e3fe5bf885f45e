"""What a study will take and what it can find, before its first run."""

import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from mgvq.analysis.records.records import StudyRecord, read_record
from mgvq.analysis.statistics.compare import PROCEDURE, differences
from mgvq.analysis.statistics.leniency import told_lenient
from mgvq.analysis.statistics.measures import MEASURES
from mgvq.analysis.statistics.significance import Components, smallest_difference, variance_components
from mgvq.errors import UserError
from mgvq.studies.kinds import Kind
from mgvq.studies.plan import PlannedRun, distinct
from mgvq.studies.spec import Study

_START_S = 10  # imports and loading the model, which no metric counts
log = logging.getLogger(__name__)


def predicted_seconds(runs: Sequence[PlannedRun], jobs: int) -> float | None:
    """What the missing runs will take, `jobs` side by side; None while no run at all has finished in this results folder.

    A run takes the median time of the finished runs of its arm; without one that of the study's, without these that of the
    folder's.
    """
    once = distinct(runs)
    done, missing = [r for r in once if r.folder.is_done()], [r for r in once if not r.folder.is_done()]
    by_arm: dict[str, list[float]] = {}
    for run in done:
        if seconds := _seconds(run.folder.path):
            by_arm.setdefault(run.arm, []).append(seconds)
    others = [s for times in by_arm.values() for s in times]
    others = others or [s for mark in once[0].folder.path.parent.glob("*/DONE") if (s := _seconds(mark.parent))]
    if not others:
        return None
    return sum(statistics.median(by_arm.get(run.arm, others)) for run in missing) / min(jobs, max(1, len(missing)))


def _seconds(folder: Path) -> float | None:
    """What a finished run took; None for one whose metrics cannot be read, which is told where its numbers are used."""
    try:
        metrics = json.loads((folder / "metrics.json").read_bytes())
        return _START_S + sum(float(value) for name, value in metrics.items() if name.startswith("time/"))
    except (OSError, ValueError, TypeError, AttributeError):
        return None


@dataclass(frozen=True, kw_only=True)
class _Variation:
    """How much differences between arms vary."""

    components: dict[str, Components]
    """The components of the median arm, by measure."""
    questions: int
    """How many questions were asked."""
    per_cluster: float
    """How many of them a cluster has."""
    source: str
    """The words that say where the numbers are from."""


_ASSUMED = _Variation(  # as found between random arms on the small models, roughly
    components={
        "accuracy": Components(seed=0.01**2, sample=0.2**2, residual=0.17**2),
        "loss": Components(seed=0.004**2, sample=0.15**2, residual=0.1**2),
    },
    questions=1000,
    per_cluster=4.0,
    source="assumed",
)
_ASSUMED_OF = "tiny_vqa/accuracy"  # the headline of the runs that the assumption is about


def detectable(study: Study, runs: Sequence[PlannedRun], records: Path) -> str:
    """The smallest differences that the study finds four times in five, and where the spread that they rest on comes from.

    That is the study's own record in the folder `records`, else the first of another study of its kind with a baseline, else,
    for the small models' questions, an assumption. Of a study that compares nothing it says what its table shows.
    """
    num_arms, kind = len(study.arms) - 1, runs[0].kind
    seeds = f"{study.least_seeds} seed{'s' * (study.least_seeds > 1)}"
    if not study.baselines or not num_arms:
        arms = f"each of its {len(study.arms)} arms" if num_arms else "its arm"
        return f"shows the mean and the spread over {seeds} of {arms}, side by side; without a baseline it tests no difference"
    found = _variation(study, records, kind) if kind else None
    if kind is None or found is None:
        return "finds what its first runs will tell: no study with its evaluation has a record of the spread yet"
    num_clusters = max(2, round((runs[0].num_samples or found.questions) / found.per_cluster))
    smallest = []
    for name, components in found.components.items():
        measure = MEASURES[name]
        difference = smallest_difference(components, num_seeds=study.least_seeds, num_samples=num_clusters, num_tests=num_arms)
        smallest.append(f"{difference * measure.factor:.{measure.decimals}f} {measure.unit} of {measure.noun}")
    tests = f"{PROCEDURE.correction_name} over {num_arms} arm{'s' * (num_arms > 1)}"
    design = f"{study.least_seeds} seeds x {num_clusters} {kind.clusters}, {tests}"
    lenient = told_lenient([study.least_seeds])
    return (
        f"finds differences of {' and '.join(smallest)} with 80 % power ({design}; spread {found.source})"
        + "\n" * bool(lenient)
        + lenient
    )


def _variation(study: Study, folder: Path, kind: Kind) -> _Variation | None:
    own = folder / f"{study.name}.parquet"
    for path in [own, *sorted(p for p in folder.glob("*.parquet") if p != own)]:
        if path.is_file() and (record := _readable(path)) and record.baseline is not None and record.kind == kind:
            components = {name: _median_components(record, name) for name in kind.measures}
            known = {name: found for name, found in components.items() if found}
            if len(known) == len(components):
                asked = record.questions
                per_cluster = len(asked) / asked.picture.nunique()
                return _Variation(components=known, questions=len(asked), per_cluster=per_cluster, source=f"of {path.stem}")
    return _ASSUMED if kind.headline == _ASSUMED_OF else None


def _readable(path: Path) -> StudyRecord | None:
    """A record, or None with a warning: a damaged one of some study is no reason not to run another."""
    try:
        return read_record(path)
    except UserError as error:
        log.warning("%s", error)
        return None


def _median_components(record: StudyRecord, measure: str) -> Components | None:
    """The components of the median arm over all grid points; None where no arm has several seeds, clusters and all values."""
    found = [
        variance_components(d) for _, _, d in differences(record, MEASURES[measure]) if min(d.shape) > 1 and np.isfinite(d).all()
    ]
    if not found:
        return None
    return Components(**{f.name: float(np.median([getattr(c, f.name) for c in found])) for f in fields(Components)})
