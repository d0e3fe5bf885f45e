"""`mgvq-runs`: what lies in the results folder. `mgvq-runs verify` checks that everything there is what was written."""

import argparse
import sys
from collections import Counter
from pathlib import Path

from mgvq.cli.utf8 import use_utf8
from mgvq.errors import UserError
from mgvq.runs.places import results_folder
from mgvq.runs.verify import verify

VERIFY = """\
Checked are the files of every finished run by the digests in its DONE, every checkpoint by its own digests, and every file of
cached statistics by the one beside it. What is bad gets a line on stdout that says what is wrong and what mends it; the last
line, on stderr, counts. Nothing is changed. A run that has not finished is no result, and is left out.

  mgvq-runs verify                     the results folder: MGVQ_RESULTS, or results/ of the checkout
  mgvq-runs verify results/runs/ID     one run
  mgvq-runs verify DIR/checkpoint      a checkpoint that was copied somewhere

exit status: 0 all is as it was written, 1 something is not, 2 a folder is missing
"""


def main() -> None:
    """Entry point: exits with 0 where all is well, 1 where something is bad, 2 for a folder that is missing."""
    use_utf8()
    parser = argparse.ArgumentParser(prog="mgvq-runs", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    checking = commands.add_parser(
        "verify",
        help="check runs, checkpoints and cached statistics by their digests",
        description="Check that runs, checkpoints and cached statistics are what was written.",
        epilog=VERIFY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    checking.add_argument("folders", type=Path, nargs="*", metavar="FOLDER", help="what to check (default: the results folder)")
    arguments = parser.parse_args()
    try:
        bad = _verify(arguments.folders or [results_folder()])
    except UserError as error:
        print(f"mgvq-runs: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nmgvq-runs: interrupted; nothing is changed.", file=sys.stderr)
        sys.exit(130)
    sys.exit(1 if bad else 0)


def _verify(folders: list[Path]) -> int:
    """Print what is bad, and the counts; the number of bad things."""
    checked, bad = Counter[str](), Counter[str]()
    for thing in verify(folders):
        checked[thing.kind] += 1
        if thing.fault:
            bad[thing.kind] += 1
            print(f"BAD {thing.kind}: {thing.fault}", flush=True)
    names = {"run": "runs", "checkpoint": "checkpoints", "statistics": "files of statistics", "teacher": "files of states"}
    counts = ", ".join(f"{checked[kind]} {name}" for kind, name in names.items())
    wrong = ", ".join(f"{bad[kind]} {name}" for kind, name in names.items() if bad[kind])
    print(f"checked: {counts}; {f'bad: {wrong}' if wrong else 'all as they were written'}", file=sys.stderr)
    return bad.total()


if __name__ == "__main__":
    main()
