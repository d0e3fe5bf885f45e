"""Two hundred runs of one study in one process, without growth of memory, of open files or of the time that it takes to list the
runs; and a study of 2,000 runs, which is planned within ten seconds."""

import gc
import logging
import os
import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from compared import QUICK, faults_of, litter, results_in
from trials import Outcome

from mgvq.studies.launch import launch
from mgvq.studies.launchers.job import Command, Start
from mgvq.studies.plan import PlannedRun, build_components, distinct, expand
from mgvq.studies.spec import Study

NUM_RUNS, NUM_PLANNED, PLAN_S = 200, 2000, 10.0
GROWTH_MB, GROWTH_FILES = 32, 4
"""From the first quarter of the runs to the last: allocators and caches are warm by then."""
WHOLE, SAMPLE = 2, 0


def missing() -> str:
    return "" if Path("/proc/self/statm").exists() else "memory and open files are read from /proc."


def trials(scratch: Path, number: int) -> Iterator[Outcome]:
    yield from (trial(scratch) for trial in (_plans, _runs)[:number])


def large_study(num_evaluations: int) -> Study:
    """A study of 100 runs for every seed of the evaluation: 20 arms, 5 rates; 5 seeds where something is random."""
    methods = ("rtn", "kmeans", "gptq", "gptvq", "mgvq")
    return Study(
        name="large",
        question="how long does it take to plan?",
        common=["model=tiny_internvl", "scope=language"],
        arms={f"{m}, {n}": [f"method={m}", f"evaluation.num_questions={n}"] for m in methods for n in (8, 16, 24, 32)},
        grid={"budget.bits_per_weight": [2.0, 2.5, 3.0, 3.5, 4.0], "evaluation.seed": list(range(num_evaluations))},
        seeds=[0, 1, 2, 3, 4],
    )


def _plans(scratch: Path) -> Outcome:
    since = time.process_time()  # of this process: others may have the machine
    with results_in(scratch / "planned"):
        runs = expand(large_study(NUM_PLANNED // 500))
        missing = sum(not run.folder.is_done() for run in distinct(runs))
    seconds = time.process_time() - since
    print(f"soak: {len(runs)} runs planned in {seconds:.1f} s, {missing} of them different", flush=True)
    wrong = [] if len(runs) == NUM_PLANNED else [f"{len(runs)} runs were planned"]
    wrong += [f"planning took {seconds:.1f} s of processor time"] if seconds > PLAN_S else []
    return Outcome(f"{NUM_PLANNED} runs planned within {PLAN_S:g} s", wrong="; ".join(wrong))


@dataclass
class _Inside:
    """A launcher whose runs happen in this process, one after the other; what the process held after each."""

    runs: list[PlannedRun]
    jobs: int | None = 1
    memory_mb: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    listing_s: list[float] = field(default_factory=list)

    @contextmanager
    def open(self, scratch: Path) -> Iterator[Start]:
        waiting = iter(self.runs)

        def start(command: Command, slot: int) -> "_Done":
            from mgvq.runs.execute import execute

            run = next(waiting)
            assert list(run.overrides) == command.words[3 : 3 + len(run.overrides)]
            execute(run.cfg, run.folder)
            gc.collect()
            self.memory_mb.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6)
            self.files.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208 (a path of each would be a file of each)
            since = time.perf_counter()
            done = sum(other.folder.is_done() for other in self.runs)
            self.listing_s.append(time.perf_counter() - since)
            assert done == len(self.memory_mb)
            return _Done()

        yield start


class _Done:
    def poll(self) -> int:
        return 0

    def stop(self) -> None:
        pass


def _runs(scratch: Path) -> Outcome:
    study = Study(
        name="soak",
        question="does anything grow?",
        common=[*QUICK, "method=kmeans", "codebook.sample=64"],
        arms={"kmeans": []},
        grid={"evaluation.seed": [1, 2]},  # the second half takes over the checkpoints of the first
        seeds=list(range(NUM_RUNS // 2)),
    )
    logging.getLogger("mgvq").setLevel(logging.WARNING)
    with results_in(scratch / "soak"):
        runs = distinct(expand(study))
        build_components(runs)
        launcher = _Inside(runs)
        failures = launch(runs, launcher)
    wrong = [f"{len(failures)} runs failed"] if failures else []
    quarter = len(runs) // 4
    for name, values, allowed in (
        ("MB of memory", launcher.memory_mb, GROWTH_MB),
        ("open files", launcher.files, GROWTH_FILES),
        ("seconds to list the runs", launcher.listing_s, 0.05),
    ):
        first, last = (statistics.median(part) for part in (values[quarter : 2 * quarter], values[-quarter:]))
        print(f"soak: {first:.4g} {name} in the second quarter, {last:.4g} in the last", flush=True)
        if last - first > allowed:
            wrong.append(f"{name} grow from {first:.4g} to {last:.4g}")
    results = scratch / "soak"
    wrong += [*faults_of(results)[:3], *litter(results)[:3]]
    return Outcome(
        f"{NUM_RUNS} runs of one study in one process", compared=NUM_RUNS, equal=len(runs) - len(failures), wrong="; ".join(wrong)
    )
