"""What finished runs hold, what else lies about, and whether a results folder can be believed."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mgvq.runs.verify import verify

NAMES = ("checkpoint/", "samples.parquet", "ledger.parquet", "layers.parquet", "allocation.parquet", "identity.json")
"""The beginnings of the names of a run's files that have the same bytes whenever its settings are run."""
QUICK = ("model=tiny_internvl", "scope=language_projector", "evaluation.num_questions=8", "evaluation.answers=forced")
CALIBRATED = (*QUICK, "method=gptq", "calibration.num_images=4", "calibration.heldout_images=0")
"""A run with all stages: it collects statistics, keeps them, and rounds layers with them."""
PLAIN = (*QUICK, "method=rtn")
"""A run without calibration."""


@contextmanager
def results_in(folder: Path) -> Iterator[None]:
    """Inside, `folder` is where results lie."""
    before = os.environ.get("MGVQ_RESULTS")
    os.environ["MGVQ_RESULTS"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("MGVQ_RESULTS") if before is None else os.environ.update(MGVQ_RESULTS=before)


def timeless(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics with 0 for seconds and memory: no two runs have the same."""
    return {name: 0.0 if name.startswith(("time/", "memory/")) else value for name, value in metrics.items()}


def run_files(results: Path) -> dict[str, str]:
    """SHA-256 by name of the files of all finished runs that have to be equal, the metrics without seconds among them."""
    found = {}
    for done in sorted(results.glob("runs/*/DONE")):
        run = done.parent
        for name in json.loads(done.read_text()):
            if name.startswith(NAMES):
                found[f"{run.name}/{name}"] = hashlib.sha256((run / name).read_bytes()).hexdigest()
        metrics = json.dumps(timeless(json.loads((run / "metrics.json").read_text())), sort_keys=True)
        found[f"{run.name}/metrics"] = hashlib.sha256(metrics.encode()).hexdigest()
    return found


def statistics_files(results: Path) -> dict[str, str]:
    """SHA-256 by name of the cached statistics."""
    files = sorted(results.glob("cache/statistics/*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def faults_of(results: Path) -> list[str]:
    """What `mgvq-runs verify` finds wrong."""
    return [found.fault for found in verify([results]) if found.fault]


def litter(results: Path) -> list[str]:
    """Files that are neither of a finished run, nor a mark or lock beside it, nor whole statistics."""
    left = []
    for file in sorted(f for f in results.rglob("*") if f.is_file()):
        name = file.relative_to(results)
        place = name.parts
        if ".locks" in place or ".logs" in place or place[0] in ("multirun", "wandb"):
            continue
        if place[0] == "runs":
            run = results / "runs" / place[1]
            own = json.loads((run / "DONE").read_text()) if (run / "DONE").is_file() else {}
            if str(file.relative_to(run)) not in {*own, *(["DONE", "TRACKED"] if own else [])}:
                left.append(str(name))
        elif file.suffix not in (".safetensors", ".sha256") or not file.with_suffix(".safetensors").is_file():
            left.append(str(name))
    return left


def differing(found: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """The names that two sets of files do not share, with the same bytes; empty where they are equal."""
    differ = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    return f"{', '.join(differ[:5])} differ" if differ else ""


def number_equal(found: Mapping[str, str], wanted: Mapping[str, str]) -> int:
    return sum(found.get(name) == digest for name, digest in wanted.items())
