"""Processes of this machine."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mgvq.checks import whole_number
from mgvq.errors import UserError
from mgvq.studies.launchers.job import Command, Start, end


@dataclass(frozen=True, kw_only=True)
class Local:
    """`jobs` runs side by side, each of so many `processes`.

    With `gpus` (device numbers) each process has one of them, and shares it where there are more processes than devices.
    """

    jobs: int = 1
    processes: int = 1
    gpus: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        whole_number("launcher local: jobs", self.jobs, least=1)
        whole_number("launcher local: processes", self.processes, least=1)
        if not (isinstance(self.gpus, list) and all(type(g) is int and g >= 0 for g in self.gpus)):
            raise UserError(f"launcher local: gpus must be a list of device numbers such as [0, 1], got {self.gpus!r}.")

    @contextmanager
    def open(self, scratch: Path) -> Iterator[Start]:
        def start(command: Command, slot: int) -> Process:
            first, number = slot * self.processes, len(self.gpus)
            seen = dict.fromkeys(str(self.gpus[at % number]) for at in range(first, first + self.processes) if number)
            return Process(command.popen(**({"CUDA_VISIBLE_DEVICES": ",".join(seen)} if seen else {})))

        yield start


@dataclass(frozen=True)
class Process:
    """A run as a child of this process."""

    process: subprocess.Popen[bytes]

    def poll(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        end(self.process)
