"""Kills a study with all its runs (`kill -9`) at random moments, resumes it, compares the outcome with an undisturbed one's.

    python experiments/resume/kill_and_resume.py --points 50

Writes results/tables/resume.md after every kill; exits with 1 if an outcome differs.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mgvq.analysis.records.collect import collect
from mgvq.analysis.records.records import write_record
from mgvq.analysis.report import write_tables
from mgvq.runs.places import results_folder
from mgvq.studies.plan import expand
from mgvq.studies.spec import read_study

STUDY = """
name: resume
question: is a study that was killed and resumed the same?
common: [model=tiny_internvl, scope=language_projector, evaluation.num_questions=8, evaluation.answers=forced]
arms: {rtn: [method=rtn], kmeans: [method=kmeans, codebook.sample=64]}
seeds: [0]
baseline: rtn
"""
COMPARED = ("checkpoint/", "samples.parquet", "ledger.parquet", "layers.parquet", "allocation.parquet", "identity.json")


def start(study: Path, results: Path) -> subprocess.Popen[bytes]:
    """The command, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "mgvq.cli.study", str(study), "--jobs", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "MGVQ_RESULTS": str(results)},
        start_new_session=True,
    )


def finish(study: Path, results: Path) -> tuple[float, float]:
    """Run the study to its end; the seconds until its first run writes, and those after. A failure raises with its output."""
    since = time.monotonic()
    process = start(study, results)
    wait_for_a_run(process, results)
    begun = time.monotonic()
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors.decode())
    return begun - since, time.monotonic() - begun


def wait_for_a_run(process: subprocess.Popen[bytes], results: Path) -> None:
    """Until a run has its folder, or the study has ended."""
    while not run_folders(results) and process.poll() is None:
        time.sleep(0.01)


def run_folders(results: Path) -> list[Path]:
    return [folder for folder in (results / "runs").glob("*") if not folder.name.startswith(".")]


def kill(study: Path, results: Path, moment: float, before: float, after: float) -> str:
    """Kill the study; how far it was, or that it had ended before.

    `moment` in [-.1, 1): below 0 before any run writes, in tenths of `before` seconds; else that share of `after` seconds behind
    the first file, wherever the load of the machine puts it.
    """
    process = start(study, results)
    if moment >= 0:
        wait_for_a_run(process, results)
    try:
        process.communicate(timeout=moment * after if moment >= 0 else (1 + 10 * moment) * before)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return how_far(results)
    return "the study had ended"


def how_far(results: Path) -> str:
    """By the files that lie there."""
    runs = run_folders(results)
    if not runs:
        return "no run had written anything"
    if (done := sum((run / "DONE").exists() for run in runs)) == 2:
        return "both runs were done"
    if done:
        return "one run was done"
    if any((run / "ledger.parquet").exists() for run in runs):
        return "a checkpoint was written"
    return "a run had begun"


def outcome(study: Path, results: Path) -> dict[str, str]:
    """SHA-256 of the tables, and of the files of every run. Seconds and memory count as 0: no two runs have the same."""
    os.environ["MGVQ_RESULTS"] = str(results)
    planned = read_study(study)
    runs = expand(planned)
    record = collect(planned, runs)
    cells = [replace(c, runs=tuple(replace(run, metrics=_timeless(run.metrics)) for run in c.runs)) for c in record.cells]
    record = replace(record, cells=tuple(cells))
    write_tables(planned.name, record, results / "compared")
    write_record(record, results / "compared" / "record.parquet")
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (results / "compared/tables").iterdir()}
    found["records"] = hashlib.sha256((results / "compared" / "record.parquet").read_bytes()).hexdigest()
    for run in runs:
        written = json.loads((run.folder.path / "DONE").read_text(encoding="utf-8"))
        found |= {f"{run.folder.path.name}/{name}": sha for name, sha in written.items() if name.startswith(COMPARED)}
    return found


def _timeless(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: 0.0 if name.startswith(("time/", "memory/")) else value for name, value in metrics.items()}


def table(rows: list[dict[str, object]]) -> str:
    """Markdown: a row for each state in which the study was killed."""
    frame = pd.DataFrame(rows).groupby("when killed", sort=False).agg(kills=("same", "size"), identical=("same", "sum"))
    frame.loc["all"] = frame.sum()
    return (
        f"{frame.to_markdown()}\n\nA study of two runs, killed at random moments (one in eleven before any run writes, the "
        "others drawn uniformly from the time that the runs take), then started again. Identical: tables, records, checkpoints "
        "and answers have the same bytes as the undisturbed study's.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=50, help="kills (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of their moments (default: 0)")
    parser.add_argument("--out", type=Path, default=results_folder() / "tables/resume.md", help="the table")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        study = Path(scratch) / "study.yaml"
        study.write_text(STUDY, encoding="utf-8")
        before, after = finish(study, Path(scratch) / "undisturbed")
        wanted = outcome(study, Path(scratch) / "undisturbed")
        rows: list[dict[str, object]] = []
        for number, moment in enumerate(np.random.default_rng(arguments.seed).uniform(-0.1, 1, arguments.points)):
            results = Path(scratch) / str(number)
            state = kill(study, results, moment, before, after)
            finish(study, results)
            same = outcome(study, results) == wanted
            rows.append({"when killed": state, "same": same})
            arguments.out.write_text(table(rows), encoding="utf-8")
            print(f"{number + 1}/{arguments.points} at {moment:.0%}, {state}: {'same' if same else 'DIFFERENT'}", flush=True)
    print(arguments.out.read_text(encoding="utf-8"))
    sys.exit(not all(row["same"] for row in rows))


if __name__ == "__main__":
    main()
