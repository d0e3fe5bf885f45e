"""`mgvq-report`: a study's record, tables and figures from its finished runs (of a frozen study: from its record); the tables in
READMEs; a report to read."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mgvq.cli.mistakes import mistakes_told
from mgvq.cli.utf8 import use_utf8
from mgvq.errors import UserError
from mgvq.runs.places import checkout, results_folder
from mgvq.studies.plan import PlannedRun, expand
from mgvq.studies.spec import Study, read_studies, read_study

if TYPE_CHECKING:
    import pandas as pd

    from mgvq.analysis.records.recorded import Recorded
    from mgvq.analysis.records.records import StudyRecord

# What draws and what reads parquet is imported where it is used: help and bad study files need none of it.
EPILOG = """\
Runs are read only where their files are those that the run wrote. A study of which a run is missing, failed or damaged is
refused, unless with --partial: then tables, figures and verdict are of the others, say so, and are called STUDY_partial.
"""


def main() -> None:
    """Entry point: prints what it wrote; exits with 2 where a run is missing or a file is bad, 130 after Ctrl-C."""
    use_utf8()
    parser = argparse.ArgumentParser(prog="mgvq-report", description=__doc__, epilog=EPILOG)
    parser.add_argument("study", type=Path, nargs="?", help="a study file, experiments/*/study.yaml")
    parser.add_argument("other", type=Path, nargs="?", help="with --html: another study, beside the first on one page")
    parser.add_argument("--from-records", action="store_true", help="use results/records/, not the run folders")
    parser.add_argument("--recorded", action="store_true", help="take runs without a folder here from any record that has them")
    parser.add_argument("--partial", action="store_true", help="report on the runs that are there, as STUDY_partial")
    parser.add_argument("--html", action="store_true", help="results/reports/STUDY/index.html too: one file, no server")
    parser.add_argument("--paper", action="store_true", help="instead of a study: our numbers beside the published ones")
    arguments = parser.parse_args()
    if (arguments.study is None) != arguments.paper:
        parser.error("one of STUDY and --paper")
    if arguments.paper and (arguments.html or arguments.from_records or arguments.partial):
        parser.error("--paper always reads records, and has no HTML")
    if arguments.partial and arguments.from_records:
        parser.error("--partial reads run folders, since records are of complete studies: leave out --from-records")
    if arguments.recorded and (arguments.from_records or arguments.paper or arguments.other):
        parser.error("--recorded is about runs for a new record: give it with a study alone, or with --partial or --html")
    if arguments.other and (not arguments.html or arguments.partial or arguments.from_records):
        parser.error("two studies are compared on a page, always from their records: give --html alone")
    with mistakes_told("mgvq-report"):
        _report(arguments, results_folder())


def _report(arguments: argparse.Namespace, results: Path) -> None:
    if arguments.other:
        print(_two(arguments.study, arguments.other, results))
        return
    if arguments.paper:
        written = _paper(results)
    else:
        written = [path for study in read_studies(arguments.study) for path in _study(study, arguments, results)]
    print(*written, sep="\n")
    root = checkout()
    if root and results == root / "results" and not arguments.partial:  # not where MGVQ_RESULTS points
        _refresh(root, results)


def _study(study: Study, arguments: argparse.Namespace, results: Path) -> list[Path]:
    recorded = _recorded(study, results) if arguments.recorded else None
    if arguments.partial:
        return _partial(study, results, recorded, html=arguments.html)
    if not (arguments.from_records or study.frozen):
        _write_records(study, results, recorded)
    return _write_report(study, results, html=arguments.html)


def _recorded(study: Study, results: Path) -> "Recorded":
    from mgvq.analysis.records.recorded import Recorded

    return Recorded(results, study.name)


def _write_records(study: Study, results: Path, recorded: "Recorded | None") -> None:
    from mgvq.analysis.records.collect import collect
    from mgvq.analysis.records.layers import layers_path, write_layers
    from mgvq.analysis.records.records import write_record

    runs = expand(study)
    record, layers = collect(study, runs, recorded=recorded), _layers(runs, None, recorded)
    write_record(record, results / "records" / f"{study.name}.parquet")
    write_layers(layers, layers_path(results, study.name))


def _layers(runs: Sequence[PlannedRun], record: "StudyRecord | None", recorded: "Recorded | None") -> "pd.DataFrame":
    """In the order of the study file, wherever the rows come from."""
    import pandas as pd

    from mgvq.analysis.records.layers import collect_layers

    layers = collect_layers(runs, record)
    parts = [part for part in (layers, recorded.layers(runs)) if len(part)] if recorded else []  # empty ones have no dtypes
    if not parts:
        return layers
    places = {cell: place for place, cell in enumerate(dict.fromkeys((json.dumps(run.point), run.arm) for run in runs))}
    both = pd.concat(parts, ignore_index=True)
    order = pd.Series([places[cell] for cell in zip(both.point, both.arm, strict=True)]).sort_values(kind="stable").index
    return both.loc[order].reset_index(drop=True)


def _write_report(study: Study, results: Path, *, html: bool) -> list[Path]:
    """The report from the record as it is written, so rounded: whoever rebuilds the figures starts from these digits."""
    from mgvq.analysis.records.layers import layers_path, read_layers
    from mgvq.analysis.records.records import read_record

    record, layers = read_record(results / "records" / f"{study.name}.parquet"), read_layers(layers_path(results, study.name))
    return _write(study.name, study, record, layers, results, html=html)


def _partial(study: Study, results: Path, recorded: "Recorded | None", *, html: bool) -> list[Path]:
    from mgvq.analysis.records.collect import collect

    runs = expand(study)
    record = collect(study, runs, partial=True, recorded=recorded)
    if not record.missing:
        print(f"mgvq-report: no run of {study.name} is missing; without --partial it gets its record.", file=sys.stderr)
    return _write(f"{study.name}_partial", study, record, _layers(runs, record, recorded), results, html=html)


def _write(name: str, study: Study, record: "StudyRecord", layers: "pd.DataFrame", results: Path, *, html: bool) -> list[Path]:
    from mgvq.analysis.report import write_figures, write_tables
    from mgvq.analysis.tables.limits_table import write_limits

    written = [
        *write_tables(name, record, results),
        *write_limits(name, layers, results),
        *write_figures(name, record, layers, results),
    ]
    if html:
        from mgvq.analysis.html import write_html

        written.append(write_html(name, study, record, results))
    return written


def _two(first: Path, second: Path, results: Path) -> Path:
    """The page of two studies, from their records, which must be there."""
    from mgvq.analysis.records.records import read_record
    from mgvq.analysis.two_studies import write_two

    studies = read_study(first), read_study(second)
    if studies[0].name == studies[1].name:
        raise UserError(f"{first} and {second} are both called {studies[0].name}, and have one record: give two studies.")
    a, b = ((study, read_record(results / "records" / f"{study.name}.parquet")) for study in studies)
    return write_two(a, b, results)


def _paper(results: Path) -> list[Path]:
    from mgvq.analysis.tables.paper_tables import write_paper

    return write_paper(results)


def _refresh(root: Path, results: Path) -> None:
    """Put the tables into the READMEs of the checkout."""
    from mgvq.analysis.report import pages_with_tables, with_tables

    for page in pages_with_tables(root):
        page.write_text(with_tables(page.read_text(encoding="utf-8"), results / "tables"), encoding="utf-8")


if __name__ == "__main__":
    main()
