"""`mgvq-study`: run what a study lacks, then print its table."""

import argparse
import sys
from pathlib import Path

from mgvq.analysis.forecast import detectable, predicted_seconds
from mgvq.analysis.records import collect
from mgvq.analysis.render import markdown
from mgvq.errors import UserError
from mgvq.runs.build import build
from mgvq.runs.places import results_folder
from mgvq.runs.tracking import track
from mgvq.studies.launch import launch
from mgvq.studies.plan import build_components, distinct, expand
from mgvq.studies.spec import read_study


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main() -> None:
    """Entry point: exits with 0 when every run is done, 1 where one failed, 2 for a bad study."""
    parser = argparse.ArgumentParser(
        prog="mgvq-study",
        description=__doc__,
        epilog="Finished runs are never run again; after a failure, or a kill, the same command goes on where it stopped.",
    )
    parser.add_argument("study", type=Path, help="a study file, experiments/*/study.yaml")
    parser.add_argument("--jobs", type=_positive, default=1, help="runs side by side, each with one thread (default: 1)")
    parser.add_argument("--dry", action="store_true", help="check and list the runs, start none")
    parser.add_argument("--tracker", choices=("csv", "wandb"), help="mirror every run there (default: as the study file says)")
    arguments = parser.parse_args()
    try:
        study = read_study(arguments.study)
        runs = expand(study, *([f"tracker={arguments.tracker}"] if arguments.tracker else []))
    except UserError as error:
        print(f"mgvq-study: {error}", file=sys.stderr)
        sys.exit(2)
    once = distinct(runs)
    missing = sum(not run.folder.is_done() for run in once)
    seconds = predicted_seconds(runs, arguments.jobs)
    duration = "unknown, no run has finished here yet" if seconds is None else f"about {seconds / 60:.1f} min"
    print(f"{study.name}: {study.question}\n{len(once)} runs, {len(once) - missing} done, {missing} to run (time: {duration})")
    print(detectable(study, runs, results_folder() / "records"), flush=True)
    if arguments.dry:
        for run in once:
            print("done   " if run.folder.is_done() else "missing", run.folder.path, " ".join(run.overrides))
        return
    try:
        build_components(runs)
    except UserError as error:
        print(f"mgvq-study: {study.name}, {error}", file=sys.stderr)
        sys.exit(2)
    failures = launch(runs, arguments.jobs)
    for run in once:  # those that were done before, or killed before they could tell; the others have been told of
        if run.folder.is_done() and (tracker := build(run.cfg, "tracker")):
            track(tracker, run.folder)
    for failure in failures:
        print(f"\nFAILED ({failure.returncode}) {' '.join(failure.run.overrides)}\n{failure.output}", file=sys.stderr)
    if failures:
        print(f"{len(failures)} runs failed; the same command retries them.", file=sys.stderr)
        sys.exit(1)
    print(f"\n{markdown(collect(study, runs))}\nrun folders: {runs[0].folder.path.parent}")


if __name__ == "__main__":
    main()
