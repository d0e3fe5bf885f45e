"""Runs what is missing, one process a run, a few side by side, here or on a cluster."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mgvq.errors import SharedFault, UserError
from mgvq.progress import last_told
from mgvq.runs.files import disk_faults_told
from mgvq.studies.launchers.job import Job, Launcher, command
from mgvq.studies.launchers.local import Local
from mgvq.studies.launchers.ray import Ray
from mgvq.studies.launchers.slurm import Slurm
from mgvq.studies.plan import PlannedRun, distinct

_TORCHRUN = re.compile(r"^[WE]\d{4} [^\n]*torch/distributed/elastic/.*", re.MULTILINE | re.DOTALL)
_LOOK_S, _TELL_S = 2.0, 60.0  # how often a terminal, and a pipe, is told how far the runs are
LAUNCHERS: dict[str, type[Local] | type[Slurm] | type[Ray]] = {"local": Local, "slurm": Slurm, "ray": Ray}


def choose(name: str, jobs: int | None, settings: Path | None) -> Launcher:
    """A launcher with the settings of a yaml file. Raises UserError for bad ones, and where its package is not installed."""
    given = {} if jobs is None else {"jobs": jobs}
    try:
        read = yaml.safe_load(settings.read_text(encoding="utf-8")) or {} if settings else {}
        return LAUNCHERS[name](**{**read, **given})
    except (OSError, TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{settings} is no file of settings of the launcher {name}: {error}") from error


@dataclass(frozen=True)
class Failure:
    """A run that ended badly, with the end of its output. `returncode` is negative for a signal that ended it."""

    run: PlannedRun
    returncode: int
    output: str
    log: Path


@dataclass(frozen=True)
class _Started:
    run: PlannedRun
    job: Job
    slot: int
    log: Path
    reserved: IO[bytes]
    since: float


def launch(runs: Sequence[PlannedRun], launcher: Launcher) -> list[Failure]:
    """Run every planned run that is not done, each once; a failure does not stop the others, unless all would meet its reason.

    Runs that another study has started are left to it, until they are done or it gives them up. Outputs are kept in
    `runs/.logs`. A terminal shows a bar with the time left and one for each run that is going on, with its block, minutes left
    and peak memory; a pipe gets a line a finished run, and one a minute for each that is going on (stderr, both). When
    interrupted the started runs are ended.
    """
    waiting = []
    for run in distinct(runs):
        if run.folder.is_done():
            run.folder.discard_partial()
        else:
            waiting.append(run)
    if not waiting:
        return []
    logs = waiting[0].folder.path.parent / ".logs"
    with disk_faults_told(logs):
        logs.mkdir(parents=True, exist_ok=True)
    slots = list(range(launcher.jobs or len(waiting)))
    running: list[_Started] = []
    failures: list[Failure] = []
    with launcher.open(logs) as start, _Report(len(waiting)) as report:
        try:
            while waiting or running:
                for run in waiting.copy():
                    if not slots:
                        break
                    if (reserved := run.folder.reserve()) is None:
                        continue
                    waiting = [other for other in waiting if other is not run]
                    if run.folder.is_done():
                        reserved.close()
                        report.ended(run, "done by another study")
                        continue
                    slot, log = slots.pop(0), logs / f"{run.folder.path.name}.log"
                    job = start(command(run, log, launcher.processes), slot)
                    running.append(_Started(run, job, slot, log, reserved, time.monotonic()))
                report.going_on(running)
                for started in running.copy():
                    if (status := started.job.poll()) is None:
                        continue
                    running.remove(started)
                    started.reserved.close()
                    slots.append(started.slot)
                    report.ended(started.run, f"{'FAILED' if status else 'done'} after {time.monotonic() - started.since:.0f} s")
                    if status and waiting and SharedFault.MARK in _tail(started.log):
                        report.say(f"the runs that are left would fail alike: {len(waiting)} of them are not started")
                        waiting = []
                    if status:
                        failures.append(Failure(started.run, status, _tail(started.log), started.log))
                time.sleep(0.1)
        finally:
            for started in running:
                started.job.stop()
                started.reserved.close()
    return failures


def _tail(log: Path) -> str:
    """The last that a run has said itself; torchrun's own account of a process that has failed does not say why."""
    said = log.read_text(errors="replace", encoding="utf-8")[-8000:] if log.is_file() else ""
    return _TORCHRUN.sub("", said)[-2000:]


def _words(run: PlannedRun) -> str:
    return " ".join(map(str, [*run.point.values(), run.arm, "seed", run.seed]))


class _Report:
    """Tells how far a study is."""

    def __init__(self, total: int) -> None:
        self.total, self.number, self.since = total, 0, time.monotonic()
        self.console = Console(stderr=True, soft_wrap=True, highlight=False)
        left = TextColumn("left"), TimeRemainingColumn()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *left
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("runs", total=total)
        self.going: dict[str, TaskID] = {}  # the bars of what runs now, by its folder
        self.looked = self.since

    def __enter__(self) -> "_Report":
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def ended(self, run: PlannedRun, state: str) -> None:
        """One more run has ended."""
        self.number += 1
        self.bar.advance(self.task)
        left = (time.monotonic() - self.since) / self.number * (self.total - self.number)
        line = f"{self.number}/{self.total} {state}: {_words(run)}" + (f" (about {left / 60:.1f} min left)" if left else "")
        self.say(line)

    def going_on(self, running: Sequence[_Started]) -> None:
        """Tell how far the started runs are, by the last line of their logs that says so: now and then, since it reads files."""
        now = time.monotonic()
        if now - self.looked < (_LOOK_S if self.console.is_terminal else _TELL_S):
            return
        self.looked = now
        told = {started.run.folder.path.name: (started, last_told(_tail(started.log))) for started in running}
        if not self.console.is_terminal:
            for started, progress in told.values():
                if progress is not None:
                    self.say(f"running: {_words(started.run)}: {progress}")
            return
        for name in self.going.keys() - told.keys():
            self.bar.remove_task(self.going.pop(name))
        for name, (started, progress) in told.items():
            if name not in self.going:
                self.going[name] = self.bar.add_task(_words(started.run), total=None)
            if progress is not None:
                words = f"{_words(started.run)}: {progress}"
                self.bar.update(self.going[name], description=words, completed=progress.done, total=progress.total)

    def say(self, line: str) -> None:
        """A line beside the bar."""
        self.console.print(line, markup=False)
