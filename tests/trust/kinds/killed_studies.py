"""A study is killed with all its runs (`kill -9`) at a random moment and started again: its tables, records, checkpoints and
answers have the same bytes as those of a study that was left alone."""

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from compared import results_in, timeless
from forks import shared_forks
from trials import Outcome

from mgvq.analysis.records.collect import collect
from mgvq.analysis.records.records import write_record
from mgvq.analysis.report import write_tables
from mgvq.studies.plan import expand
from mgvq.studies.spec import read_study

WHOLE, SAMPLE = 12, 0  # `make test` has those of ended runs
SEED = 0
STUDY = """
name: resume
question: is a study that was killed and resumed the same?
common: [model=tiny_internvl, scope=language_projector, evaluation.num_questions=8, evaluation.answers=forced]
arms: {rtn: [method=rtn], kmeans: [method=kmeans, codebook.sample=64]}
seeds: [0]
baseline: rtn
"""
ENDED = "the study had ended"
COMPARED = ("checkpoint/", "samples.parquet", "ledger.parquet", "layers.parquet", "allocation.parquet", "identity.json")


def missing() -> str:
    return "" if hasattr(signal, "SIGKILL") else "this system has no SIGKILL."


def trials(scratch: Path, number: int) -> Iterator[Outcome]:
    """One study that is left alone, then one a moment.

    A moment in [-.1, 0) comes before any run writes; one in [0, 1.1) is that share of the time from the first file to the end of
    the last run, wherever the load of the machine puts it.
    """
    study = scratch / "study.yaml"
    study.write_text(STUDY)
    before, after = finish(study, scratch / "undisturbed")
    wanted = files(study, scratch / "undisturbed")
    draws = np.random.default_rng(SEED)
    for trial in range(number):
        results = scratch / str(trial)
        case = kill(study, results, float(draws.uniform(-0.1, 1.1)), before, after)
        finish(study, results)
        found = files(study, results)
        equal = sum(found.get(name) == digest for name, digest in wanted.items())
        fault = int(case != ENDED)
        survived = int(found == wanted) * fault
        differ = ", ".join(sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name)))
        wrong = differ and f"seed {SEED}, trial {trial}: {differ} differ"
        yield Outcome(case, fault, survived, compared=len(wanted), equal=equal, wrong=wrong)


def start(study: Path, results: Path) -> subprocess.Popen[bytes]:
    """The command, in a process group of its own."""
    return subprocess.Popen(
        [str(shared_forks().python), "-m", "mgvq.cli.study", str(study), "--jobs", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "MGVQ_RESULTS": str(results)},
        start_new_session=True,
    )


def finish(study: Path, results: Path) -> tuple[float, float]:
    """Run the study to its end; the seconds until a run writes, and from there to the end of the last run.

    A failure raises with its output.
    """
    since = time.monotonic()
    process = start(study, results)
    wait_for_a_run(process, results)
    begun = time.monotonic()
    while number_done(results) < 2 and process.poll() is None:
        time.sleep(0.01)
    ended = time.monotonic()
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors.decode())
    return begun - since, ended - begun


def wait_for_a_run(process: subprocess.Popen[bytes], results: Path) -> None:
    """Return when a run has its folder, or the study has ended."""
    while not run_folders(results) and process.poll() is None:
        time.sleep(0.01)


def run_folders(results: Path) -> list[Path]:
    return [folder for folder in (results / "runs").glob("*") if not folder.name.startswith(".")]


def number_done(results: Path) -> int:
    return sum((run / "DONE").exists() for run in run_folders(results))


def kill(study: Path, results: Path, moment: float, before: float, after: float) -> str:
    """Kill the study at the moment (`trials`); how far it was, or that it had ended before."""
    process = start(study, results)
    if moment >= 0:
        wait_for_a_run(process, results)
    try:
        process.communicate(timeout=moment * after if moment >= 0 else (1 + 10 * moment) * before)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return how_far(results)
    return ENDED


def how_far(results: Path) -> str:
    """The state of the study by the files that lie there."""
    runs = run_folders(results)
    if not runs:
        return "no run had written anything"
    if (done := number_done(results)) == 2:
        return "both runs were done"
    if done:
        return "one run was done"
    if any((run / "ledger.parquet").exists() for run in runs):
        return "a checkpoint was written"
    return "a run had begun"


def files(study: Path, results: Path) -> dict[str, str]:
    """SHA-256 of the tables, and of the files of every run. Seconds and memory count as 0: no two runs have the same."""
    planned = read_study(study)
    with results_in(results):
        runs = expand(planned)
    record = collect(planned, runs)
    cells = [replace(c, runs=tuple(replace(run, metrics=timeless(run.metrics)) for run in c.runs)) for c in record.cells]
    record = replace(record, cells=tuple(cells))
    write_tables(planned.name, record, results / "compared")
    write_record(record, results / "compared" / "record.parquet")
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (results / "compared/tables").iterdir()}
    found["records"] = hashlib.sha256((results / "compared" / "record.parquet").read_bytes()).hexdigest()
    for run in runs:
        written = json.loads((run.folder.path / "DONE").read_text(encoding="utf-8"))
        found |= {f"{run.folder.path.name}/{name}": sha for name, sha in written.items() if name.startswith(COMPARED)}
    return found
