"""Jobs of a Slurm cluster, by submitit."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mgvq.checks import whole_number
from mgvq.errors import UserError
from mgvq.studies.launchers.job import Command, Start, run_to_end


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """One job a run, all with the same demands; start it on a machine that has `sbatch`, with results on a shared file system.

    `hours` is the limit of a run, after which it counts as failed. A run has so many `processes`, on one machine, each with
    `cpus`, `gpus` and `memory_gb` of its own. `options` are further ones of sbatch by their long names
    without dashes (`{account: a, constraint: a100}`); `setup` are lines of shell before the run. `cluster=local` is submitit's
    stand-in for a cluster: the jobs are processes of this machine, for trying things out.
    """

    jobs: int | None = None
    processes: int = 1
    cluster: str = "slurm"
    partition: str | None = None
    hours: float = 4.0
    cpus: int = 1
    memory_gb: float = 8.0
    gpus: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if find_spec("submitit") is None:
            raise UserError("the launcher slurm needs submitit: pip install 'mgvq[slurm]'")
        if self.cluster not in ("slurm", "local"):
            raise UserError(f"launcher slurm: cluster must be slurm or local, got {self.cluster!r}.")
        if self.jobs is not None:
            whole_number("launcher slurm: jobs", self.jobs, least=1)
        whole_number("launcher slurm: processes", self.processes, least=1)
        for name, least in (("hours", 1 / 60), ("cpus", 1), ("memory_gb", 0.1), ("gpus", 0)):
            value = getattr(self, name)
            if type(value) not in (int, float) or value < least:
                raise UserError(f"launcher slurm: {name} must be a number >= {least:.3g}, got {value!r}.")

    @contextmanager
    def open(self, scratch: Path) -> Iterator[Start]:
        import submitit  # here: an extra

        logging.getLogger("submitit").setLevel(logging.ERROR)
        try:
            executor = submitit.AutoExecutor(scratch / "slurm" / "%j", cluster=self.cluster)
            executor.update_parameters(
                name="mgvq",
                timeout_min=max(1, round(60 * self.hours)),
                cpus_per_task=self.processes * self.cpus,
                gpus_per_node=self.processes * self.gpus,
                slurm_mem=f"{round(1024 * self.processes * self.memory_gb)}MB",
                slurm_partition=self.partition,
                slurm_additional_parameters=self.options,
                slurm_setup=self.setup or None,
            )
        except RuntimeError as error:  # no sbatch
            raise UserError(f"launcher slurm: {error}. Start the study on a login node, or try cluster: local.") from error
        jobs: list[Any] = []

        def start(command: Command, slot: int) -> SlurmJob:
            jobs.append(executor.submit(run_to_end, command))
            return SlurmJob(jobs[-1], command)

        try:
            yield start
        finally:
            if self.cluster == "local":  # Slurm sees to the end of what was cancelled; here nobody else does
                for job in jobs:
                    job.wait()


@dataclass(frozen=True)
class SlurmJob:
    """A run as a job of Slurm."""

    job: Any
    command: Command

    def poll(self) -> int | None:
        if not self.job.done():
            return None
        if (error := self.job.exception()) is None:
            return self.job.result()
        self.command.complain(f"Slurm job {self.job.job_id} ended as {self.job.state}: {error}")
        return 1

    def stop(self) -> None:
        self.job.cancel(check=False)
