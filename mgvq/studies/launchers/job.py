"""What every launcher does: it starts one process a run, which writes into a log file, and says when it has ended."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from mgvq.runs.device import device_type
from mgvq.studies.plan import PlannedRun


@dataclass(frozen=True)
class Command:
    """`mgvq-run` of one planned run, on any machine that sees the same files: words, changes to the environment, where."""

    words: list[str]
    environment: dict[str, str]
    folder: str
    log: Path

    def popen(self, **environment: str) -> subprocess.Popen[bytes]:
        """Start it here, with further changes to the environment."""
        with self.log.open("wb") as output:
            return subprocess.Popen(
                self.words,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env={**os.environ, **self.environment, **environment},
            )

    def complain(self, text: str) -> None:
        """Add to the log what the run itself cannot tell."""
        with self.log.open("a", encoding="utf-8") as output:
            output.write(f"{text}\n")


def command(run: PlannedRun, log: Path, processes: int = 1) -> Command:
    """The same for every launcher. `log` has to be on a file system that the run sees.

    What `device=auto` stands for is decided where the study is planned, since runs are named by it. Several `processes` of one
    machine are started by torchrun, and share the run.
    """
    paths = {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}
    device = [f"device={device_type('auto')}"] if run.cell.device == "auto" else []
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    return Command(
        [sys.executable, *torchrun, "-m", "mgvq.cli.run", *run.overrides, *device],
        {"MGVQ_RESULTS": str(run.folder.path.parents[1]), **paths},
        os.getcwd(),  # noqa: PTH109 (as a word, for a machine on which it may be missing)
        log,
    )


def run_to_end(command: Command) -> int:
    """Run the command in a process of its own, on a machine of a cluster; its exit status, negative for a signal.

    Ends the process when it is interrupted itself.
    """
    process = command.popen()
    try:
        return process.wait()
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that may have ended: politely, after ten seconds by force."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@runtime_checkable
class Job(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """The exit status of the job, 0 for success; None while it waits or goes on."""
        ...

    def stop(self) -> None:
        """End it, whatever its state."""
        ...


Start = Callable[[Command, int], Job]


@runtime_checkable
class Launcher(Protocol):
    """Starts runs; opened once a study.

    `jobs`: how many are given to it at a time, None: all of them, and it queues them. `processes`: how many share a run, on one
    machine, to the same bytes. What `open` gives starts one, and is told
    the number of the slot, 0 .. `jobs` - 1, which no other run has meanwhile. `scratch` is a folder for the launcher's own files,
    on the file system of the results.
    """

    @property
    def jobs(self) -> int | None: ...
    @property
    def processes(self) -> int: ...
    def open(self, scratch: Path) -> AbstractContextManager[Start]: ...
