"""`mgvq-study`: run what a study lacks, then print its table."""

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mgvq.analysis.records.collect import collect
from mgvq.analysis.records.recorded import Recorded
from mgvq.analysis.statistics.forecast import detectable, predicted_seconds
from mgvq.analysis.tables.arms import arms_table
from mgvq.analysis.tables.render import markdown
from mgvq.cli.mistakes import mistakes_told
from mgvq.cli.pipes import reader_may_leave
from mgvq.cli.utf8 import use_utf8
from mgvq.errors import UserError
from mgvq.runs.build import build
from mgvq.runs.device import device_type
from mgvq.runs.places import results_folder
from mgvq.runs.tracking import track
from mgvq.studies.launch import LAUNCHERS, choose, launch
from mgvq.studies.launchers.job import Launcher
from mgvq.studies.plan import PlannedRun, build_components, distinct, expand
from mgvq.studies.quick import quick_pass, told_quick
from mgvq.studies.spec import Study, read_studies

EPILOG = """\
Finished runs are never run again; after a failure, or a kill, the same command goes on where it stopped.
Started twice, on one results folder, a study does no run twice. Ctrl-C ends the runs that were started.

  mgvq-study STUDY.yaml --dry                      what would be run, how long it takes, what it can find
  mgvq-study STUDY.yaml seed=0 evaluation.num_questions=52     a quick pass: the study, smaller; prints, records nothing
  mgvq-study STUDY.yaml --recorded                 only what no record in results/records has, such as an arm that came later
  mgvq-study STUDY.yaml --jobs 2                   two processes on this machine
  mgvq-study STUDY.yaml --launcher slurm --launcher-config cluster.yaml
  mgvq-study STUDY.yaml --launcher ray --jobs 8    a Ray cluster on this machine, or at `address`

cluster.yaml holds settings of the launcher, all of them optional:

  all     processes: 2                             processes that share a run, by torchrun; the same bytes
  local   gpus: [0, 1]                             each process has one of these devices
  slurm   partition: gpu                           hours: 4 for each run; cpus: 1, memory_gb: 8, gpus: 0 for each process
          options: {account: a}                    further ones of sbatch
          setup: [module load cuda]                shell before the run
          cluster: local                           no Slurm, but processes of this machine: for trying it out
  ray     address: auto                            a running cluster; cpus: 1, gpus: 0, memory_gb: 0 for each process

Slurm and Ray need the extras mgvq[slurm] and mgvq[ray], and results on a file system that all machines share.
"""


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main() -> None:
    """Entry point: exits with 0 when every run is done, 1 where one failed, 2 for a bad study."""
    use_utf8()
    parser = argparse.ArgumentParser(
        prog="mgvq-study",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", type=Path, help="a study file, experiments/*/study.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="a quick pass: this setting in every run; seed, and keys of the grid, keep the values given (model=a,b)",
    )
    parser.add_argument("--launcher", choices=LAUNCHERS, default="local", help="where the runs happen (default: local)")
    parser.add_argument("--launcher-config", type=Path, metavar="FILE", help="settings of the launcher, see below")
    parser.add_argument(
        "--jobs",
        type=_positive,
        help="runs side by side, each with one thread (default: 1; slurm, ray: as many as there is room for)",
    )
    parser.add_argument("--dry", action="store_true", help="check and list the runs, start none")
    parser.add_argument("--tracker", choices=("csv", "wandb"), help="mirror every run there (default: as the study file says)")
    parser.add_argument("--recorded", action="store_true", help="runs that a record in results/records has count as done")
    arguments = parser.parse_intermixed_args()
    with mistakes_told("mgvq-study"):
        launcher = choose(arguments.launcher, arguments.jobs, arguments.launcher_config)
        studies = read_studies(arguments.study)
        if arguments.overrides:
            studies = studies[:1]  # settings of a quick pass are about this study
        plans = [_plan(study, arguments) for study in studies]
    if arguments.dry:
        with reader_may_leave():
            print("\n\n".join(_told(plan, launcher, arguments.launcher, list_runs=True) for plan in plans))
        return
    print("\n\n".join(_told(plan, launcher, arguments.launcher) for plan in plans), flush=True)
    for ended in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ended) is signal.SIG_DFL:
            signal.signal(ended, signal.default_int_handler)
    try:
        for plan in plans:
            with _naming(plan.study):
                build_components(plan.to_run)
        failed = sum(_run(plan, launcher) for plan in plans)
    except UserError as error:
        print(f"mgvq-study: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        once = [run for plan in plans for run in distinct(plan.to_run)]
        done = sum(run.folder.is_done() for run in once)
        print(f"\ninterrupted with {done} of {len(once)} runs done; the same command goes on.", file=sys.stderr)
        sys.exit(130)
    if failed:
        print(f"{failed} runs failed; the same command retries them.", file=sys.stderr)
        sys.exit(1)


@dataclass(frozen=True)
class _Plan:
    """A study and its runs, before any is started."""

    study: Study
    runs: Sequence[PlannedRun]
    recorded: Recorded | None
    quick: str  # what is said of a quick pass; empty for the study itself

    @property
    def to_run(self) -> list[PlannedRun]:
        """The runs that need a folder here, finished ones among them."""
        return [run for run in self.runs if self.recorded is None or run.folder.path.name not in self.recorded]


def _plan(study: Study, arguments: argparse.Namespace) -> _Plan:
    """The study's runs, of a frozen study that is only looked at none. Raises UserError for what cannot be planned."""
    if study.frozen and arguments.overrides:
        raise UserError(
            f"study {study.name} is frozen at {study.frozen}: not run, so {' '.join(arguments.overrides)} has no effect. "
            "Overrides need a study that is not frozen: copy its file under another name and without `frozen`."
        )
    if study.frozen and arguments.dry:
        return _Plan(study, [], None, "")
    quick, last = "", []
    if arguments.overrides:
        quick = told_quick(study, arguments.overrides)
        study, last = quick_pass(study, arguments.overrides)
    tracker = [f"tracker={arguments.tracker}"] if arguments.tracker else []
    runs = expand(study, last=[*last, *tracker])
    return _Plan(study, runs, Recorded(results_folder(), study.name) if arguments.recorded else None, quick)


def _told(plan: _Plan, launcher: Launcher, name: str, *, list_runs: bool = False) -> str:
    """What a study would run, how long that takes and what it can find; with `list_runs` every run by its folder."""
    study, records = plan.study, results_folder() / "records"
    if study.frozen:
        record = records / f"{study.name}.parquet"
        return f"{study.name}: {study.question}\nfrozen at {study.frozen}: nothing is run, mgvq-report reads {record}"
    once, to_run = distinct(plan.runs), distinct(plan.to_run)
    missing = sum(not run.folder.is_done() for run in to_run)
    seconds = predicted_seconds(to_run, jobs := launcher.jobs or max(1, missing)) if to_run else 0.0
    duration = "unknown, no run has finished here yet" if seconds is None else f"about {seconds / 60:.1f} min"
    if name != "local":
        duration += f" with room for {jobs}"
        if any(run.cell.device == "auto" for run in to_run):
            duration += f"; device=auto is {device_type('auto')} here, which the runs get too; common: [device=cuda] changes it"
    kept = f", {len(once) - len(to_run)} in records" if plan.recorded else ""
    words = f"{len(once)} runs, {len(to_run) - missing} done{kept}, {missing} to run (time: {duration})"
    told = [*filter(None, [plan.quick]), f"{study.name}: {study.question}\n{words}", detectable(study, plan.runs, records)]
    if list_runs:
        known = {id(run) for run in to_run}
        for run in once:
            state = "recorded" if id(run) not in known else "done   " if run.folder.is_done() else "missing"
            told.append(f"{state} {run.folder.path} {' '.join(run.overrides)}")
    return "\n".join(told)


def _run(plan: _Plan, launcher: Launcher) -> int:
    """Run what the study lacks, print its table, and return how many runs failed. Raises UserError, naming the study."""
    study, once = plan.study, distinct(plan.to_run)
    with _naming(study):
        failures = launch(plan.to_run, launcher)
    for run in once:  # those that were done before, or killed before they could tell; the others have been told of
        if run.folder.is_done() and (tracker := build(run.cfg, "tracker")):
            track(tracker, run.folder)
    for failure in failures:
        run = failure.run
        print(
            f"\nFAILED ({failure.returncode}) arm {run.arm}, seed {run.seed}: {' '.join(run.overrides)}\n{failure.output}\n"
            f"all of it: {failure.log}",
            file=sys.stderr,
        )
    try:
        made = arms_table(collect(study, plan.runs, partial=bool(failures), recorded=plan.recorded))
        table = markdown(replace(made, warning=" ".join(filter(None, (plan.quick, made.warning)))))
    except UserError as error:
        table = f"no table: {error}\n"
    print(f"\n{table}\nrun folders: {plan.runs[0].folder.path.parent}", flush=True)
    return len(failures)


@contextmanager
def _naming(study: Study) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"study {study.name}, {error}") from error


if __name__ == "__main__":
    main()
