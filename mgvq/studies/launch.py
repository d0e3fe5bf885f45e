"""Runs what is missing, one process a run, a few side by side."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mgvq.studies.plan import PlannedRun, distinct


@dataclass(frozen=True)
class Failure:
    """A run that ended badly, with the end of its output."""

    run: PlannedRun
    returncode: int
    output: str


def launch(runs: Sequence[PlannedRun], jobs: int) -> list[Failure]:
    """Run every planned run that is not done, `jobs` at a time, each once; a failure does not stop the others.

    A terminal shows a bar with the time left, a pipe gets a line a finished run (stderr, both).
    """
    missing = [run for run in distinct(runs) if not run.folder.is_done()]
    if not missing:
        return []
    failures: list[Failure] = []
    console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
    with tempfile.TemporaryDirectory() as scratch, Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("runs", total=(total := len(missing)))
        running: dict[subprocess.Popen[bytes], tuple[PlannedRun, Path, float]] = {}
        try:
            while missing or running:
                while missing and len(running) < jobs:
                    run = missing.pop(0)
                    log = Path(scratch) / f"{run.folder.path.name}.log"
                    running[_start(run, log)] = run, log, time.monotonic()
                for process in [p for p in running if p.poll() is not None]:
                    run, log, started = running.pop(process)
                    bar.advance(task)
                    if not console.is_terminal:
                        state = f"{'FAILED' if process.returncode else 'done'} after {time.monotonic() - started:.0f} s"
                        words = " ".join(map(str, [*run.point.values(), run.arm, "seed", run.seed]))
                        print(f"{total - len(missing) - len(running)}/{total} {state}: {words}", file=sys.stderr)
                    if process.returncode:
                        failures.append(Failure(run, process.returncode, log.read_text(errors="replace")[-2000:]))
                time.sleep(0.05)
        finally:
            for process in running:
                process.terminate()
    return failures


def _start(run: PlannedRun, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mgvq.cli.run", *run.overrides]
    results = str(run.folder.path.parents[1])
    with log.open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "MGVQ_RESULTS": results})
