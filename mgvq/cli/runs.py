"""`mgvq-runs`: what lies in the results folder, listed, shown, held against each other, checked, and packed to be sent."""

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from mgvq.analysis.runs.card import CARD, TO_FILL_IN
from mgvq.analysis.runs.differences import (
    metrics_that_differ,
    provenance_of,
    provenance_that_differs,
    settings_that_differ,
    shown,
)
from mgvq.analysis.runs.listed import NOTHING, SORTS, ListedRun, chosen, find_run, read_runs
from mgvq.analysis.runs.sending import check_sent, pack
from mgvq.cli.mistakes import mistakes_told
from mgvq.cli.pipes import reader_may_leave
from mgvq.cli.utf8 import use_utf8
from mgvq.runs.places import results_folder
from mgvq.runs.verify import verify

LIST = """\
A method is the preset that the run's settings are closest to, with the settings in which it departs from that; the date is when
the run was done. A RUN is an id, the beginning of one, or a folder.

  mgvq-runs list                                   all finished runs, the latest last
  mgvq-runs list model=tiny_* seed=0 --sort score
  mgvq-runs list codebook=kmeans budget.bits_per_weight=3 --csv > runs.csv

KEY is method, model, seed, or the name of any setting that counts (mgvq-runs show RUN lists them).
"""
CHECK = """\
A run: every file by the digests in DONE, its name by its settings, its metrics by the answers that they are made of, what
provenance.json must say, and the card. A record: names by settings, metrics by answers. Digests find accidents; they are no
signature.

exit status: 0 nothing is missing or altered, 1 something is, 2 the path holds no run and no record
"""
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
    """Entry point: exits with 0 where all is well, 1 where something is bad, 2 for what is not there."""
    use_utf8()
    arguments = _parser().parse_args()
    with mistakes_told("mgvq-runs"), reader_may_leave():
        bad = arguments.does(arguments)
    sys.exit(1 if bad else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mgvq-runs", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter

    listing = commands.add_parser(
        "list", help="finished runs by method, model, seed, score and date", epilog=LIST, formatter_class=raw
    )
    listing.add_argument("filters", nargs="*", metavar="KEY=VALUE", help="only runs with this setting; * stands for anything")
    listing.add_argument("--sort", choices=SORTS, default="date", help="the order (default: date)")
    listing.add_argument("--csv", action="store_true", help="comma-separated values, with whole numbers and full ids")
    listing.set_defaults(does=_list)

    showing = commands.add_parser("show", help="settings, metrics and provenance of a run", epilog=LIST, formatter_class=raw)
    showing.add_argument("run", metavar="RUN")
    showing.set_defaults(does=_show)

    comparing = commands.add_parser("diff", help="two runs side by side: only what differs", epilog=LIST, formatter_class=raw)
    comparing.add_argument("a", metavar="A")
    comparing.add_argument("b", metavar="B")
    comparing.set_defaults(does=_diff)

    checking = commands.add_parser(
        "verify",
        help="check runs, checkpoints and cached statistics by their digests",
        description="Check that runs, checkpoints and cached statistics are what was written.",
        epilog=VERIFY,
        formatter_class=raw,
    )
    checking.add_argument("folders", type=Path, nargs="*", metavar="FOLDER", help="what to check (default: the results folder)")
    checking.set_defaults(does=lambda arguments: _verify(arguments.folders or [results_folder()]))

    packing = commands.add_parser("pack", help="a run's record with a card, to be sent: all but its checkpoint")
    packing.add_argument("run", metavar="RUN", help="an id, the beginning of one, or a folder")
    packing.add_argument("--out", type=Path, metavar="FOLDER", help="where RUN's folder goes (default: results/sent)")
    packing.set_defaults(does=_pack)

    sent = commands.add_parser(
        "check", help="what is missing or altered in a run, or a record, that was sent", epilog=CHECK, formatter_class=raw
    )
    sent.add_argument(
        "path", type=Path, metavar="FILE|FOLDER", help="a run's folder, a .zip of it, or a study's record (.parquet)"
    )
    sent.set_defaults(does=_check)
    return parser


def _list(arguments: argparse.Namespace) -> int:
    found, faults, unfinished = read_runs(results_folder() / "runs")
    header = ["run", "date", "model", "method", "seed", "bits", "score", "of"]
    runs = chosen(found, arguments.filters, arguments.sort)
    if arguments.csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows([header, *(_line(run, whole=True) for run in runs)])
    else:
        print(_plain([_line(run) for run in runs], header))
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    left = f", {unfinished} not finished" if unfinished else ""
    print(f"{len(runs)} of {len(found)} runs{left}, {len(faults)} left out", file=sys.stderr)
    return 0


def _line(run: ListedRun, *, whole: bool = False) -> list[str]:
    bits, score = run.metrics.get("bits/quantized_layers"), run.score
    date = run.date.isoformat(sep=" ", timespec="seconds" if whole else "minutes")
    numbers = [shown(bits), shown(score)] if whole else [_short(bits, "{:.3f}"), _short(score, "{:.4f}")]
    return [run.id, date, run.model, run.method, run.seed, *numbers, run.metric]


def _short(value: object, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) else NOTHING


def _plain(lines: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    return tabulate(lines, header, "plain", disable_numparse=True)


def _show(arguments: argparse.Namespace) -> int:
    run = find_run(arguments.run, results_folder() / "runs")
    print(f"{run.id}: {run.method} on {run.model}, {run.date.isoformat(sep=' ', timespec='minutes')}\n{run.folder.path}")
    for title, values in {
        "settings that count": run.flat,
        "metrics": run.metrics,
        "provenance": provenance_of(run.folder.path),
    }.items():
        print(f"\n{title}\n{_plain([['', name, shown(value)] for name, value in values.items()], [])}")
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    a, b = (find_run(name, results_folder() / "runs") for name in (arguments.a, arguments.b))
    for title, lines, more in (
        ("settings", settings_that_differ(a, b), []),
        ("metrics", metrics_that_differ(a, b), ["B - A"]),
        ("provenance", provenance_that_differs(a, b), []),
    ):
        print(_plain(lines, [title, f"A: {a.id}", f"B: {b.id}", *more]) if lines else f"{title}: alike", end="\n\n")
    return 0


def _pack(arguments: argparse.Namespace) -> int:
    run = find_run(arguments.run, results_folder() / "runs")
    print(pack(run, arguments.out or results_folder() / "sent"))
    print(f"fill in {CARD} where it says {TO_FILL_IN}, then mgvq-runs check the folder", file=sys.stderr)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    """Print what was found; the number of faults."""
    bad = 0
    for finding in check_sent(arguments.path):
        bad += finding.kind != "NOTE"
        print(f"{finding.kind}: {finding.text}", flush=True)
    print(f"{arguments.path}: {f'{bad} missing or altered' if bad else 'nothing is missing or altered'}", file=sys.stderr)
    return bad


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
