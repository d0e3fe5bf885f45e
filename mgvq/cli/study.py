"""`mgvq-study`: run what a study lacks, then print its table."""

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path

from mgvq.analysis.records.collect import collect
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
from mgvq.studies.plan import build_components, distinct, expand
from mgvq.studies.quick import quick_pass, told_quick
from mgvq.studies.spec import read_study

EPILOG = """\
Finished runs are never run again; after a failure, or a kill, the same command goes on where it stopped.
Started twice, on one results folder, a study does no run twice. Ctrl-C ends the runs that were started.

  mgvq-study STUDY.yaml --dry                      what would be run, how long it takes, what it can find
  mgvq-study STUDY.yaml seed=0 evaluation.num_questions=52     a quick pass: the study, smaller; prints, records nothing
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
    arguments = parser.parse_intermixed_args()
    with mistakes_told("mgvq-study"):
        launcher = choose(arguments.launcher, arguments.jobs, arguments.launcher_config)
        study = read_study(arguments.study)
        if study.frozen and arguments.overrides:
            raise UserError(
                f"study {study.name} is frozen at {study.frozen}: not run, so {' '.join(arguments.overrides)} has no effect. "
                "Overrides need a study that is not frozen: copy its file under another name and without `frozen`."
            )
        if study.frozen and arguments.dry:
            record = results_folder() / "records" / f"{study.name}.parquet"
            print(f"{study.name}: {study.question}\nfrozen at {study.frozen}: nothing is run, mgvq-report reads {record}")
            return
        quick, last = told_quick(study, arguments.overrides) if arguments.overrides else "", []
        if quick:
            study, last = quick_pass(study, arguments.overrides)
        runs = expand(study, *([f"tracker={arguments.tracker}"] if arguments.tracker else []), last=last)
    once = distinct(runs)
    missing = sum(not run.folder.is_done() for run in once)
    seconds = predicted_seconds(runs, jobs := launcher.jobs or max(1, missing))
    duration = "unknown, no run has finished here yet" if seconds is None else f"about {seconds / 60:.1f} min"
    if arguments.launcher != "local":
        duration += f" with room for {jobs}"
        if any(run.cell.device == "auto" for run in runs):
            duration += f"; device=auto is {device_type('auto')} here, which the runs get too; common: [device=cuda] changes it"
    plan = f"{study.name}: {study.question}\n{len(once)} runs, {len(once) - missing} done, {missing} to run (time: {duration})"
    told = [*filter(None, [quick]), plan, detectable(study, runs, results_folder() / "records")]
    if arguments.dry:
        states = ("done   " if run.folder.is_done() else "missing" for run in once)
        told += [f"{state} {run.folder.path} {' '.join(run.overrides)}" for state, run in zip(states, once, strict=True)]
        with reader_may_leave():
            print("\n".join(told))
        return
    print("\n".join(told), flush=True)
    for ended in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ended) is signal.SIG_DFL:
            signal.signal(ended, signal.default_int_handler)
    try:
        build_components(runs)
        failures = launch(runs, launcher)
    except UserError as error:
        print(f"mgvq-study: {study.name}, {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        done = sum(run.folder.is_done() for run in once)
        print(f"\ninterrupted with {done} of {len(once)} runs done; the same command goes on.", file=sys.stderr)
        sys.exit(130)
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
        made = arms_table(collect(study, runs, partial=bool(failures)))
        table = markdown(replace(made, warning=" ".join(filter(None, (quick, made.warning)))))
    except UserError as error:
        table = f"no table: {error}\n"
    print(f"\n{table}\nrun folders: {runs[0].folder.path.parent}")
    if failures:
        print(f"{len(failures)} runs failed; the same command retries them.", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
