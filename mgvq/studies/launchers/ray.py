"""Tasks of a Ray cluster."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mgvq.checks import whole_number
from mgvq.errors import UserError
from mgvq.studies.launchers.job import Command, Start, run_to_end


@dataclass(frozen=True, kw_only=True)
class Ray:
    """One task a run. Ray starts as many at a time as its machines have room for, or `jobs`, whichever is less.

    `address` is that of a running cluster (`auto`: the one of this machine), whose machines share the file system of the results;
    null starts one on this machine for as long as the study takes, with `jobs` x `processes` x `cpus` processors, or all that
    there are.
    `cpus`, `gpus` and `memory_gb` (0: not asked) are what Ray sets aside for each of the `processes` of a run.
    """

    jobs: int | None = None
    processes: int = 1
    address: str | None = None
    cpus: int = 1
    gpus: float = 0.0
    memory_gb: float = 0.0

    def __post_init__(self) -> None:
        if find_spec("ray") is None:
            raise UserError("the launcher ray needs Ray: pip install 'mgvq[ray]'")
        if self.jobs is not None:
            whole_number("launcher ray: jobs", self.jobs, least=1)
        whole_number("launcher ray: processes", self.processes, least=1)
        for name, least in (("cpus", 1), ("gpus", 0), ("memory_gb", 0)):
            value = getattr(self, name)
            if type(value) not in (int, float) or value < least:
                raise UserError(f"launcher ray: {name} must be a number >= {least}, got {value!r}.")

    @contextmanager
    def open(self, scratch: Path) -> Iterator[Start]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # without gpus a run still sees the machine's devices
        import ray  # here: an extra

        cpus = self.processes * self.cpus
        cluster = {"num_cpus": self.jobs * cpus if self.jobs else None, "include_dashboard": False}
        try:
            ray.init(self.address, log_to_driver=False, logging_level=logging.ERROR, **({} if self.address else cluster))
        except ConnectionError as error:
            raise UserError(f"launcher ray: no cluster at address {self.address!r}: {error}") from error
        # A process of its own for every task: what one leaves behind, no other finds. No retries: a failure is reported.
        demands = {"num_cpus": cpus, "num_gpus": self.processes * self.gpus, "max_retries": 0, "max_calls": 1}
        if self.memory_gb:
            demands["memory"] = round(1e9 * self.processes * self.memory_gb)
        task = ray.remote(**demands)(run_to_end)
        try:
            yield lambda command, slot: RayJob(task.remote(command), command)
        finally:
            ray.shutdown()


@dataclass(frozen=True)
class RayJob:
    """A run as a task of Ray."""

    task: Any  # ray.ObjectRef
    command: Command

    def poll(self) -> int | None:
        import ray
        import ray.exceptions

        if not ray.wait([self.task], timeout=0)[0]:
            return None
        try:
            return ray.get(self.task)
        except ray.exceptions.RayError as error:
            self.command.complain(f"Ray: {error}")
            return 1

    def stop(self) -> None:
        import ray
        import ray.exceptions

        ray.cancel(self.task)  # interrupts `run_to_end`, which ends the run
        with suppress(ray.exceptions.RayError):
            ray.get(self.task, timeout=15)
