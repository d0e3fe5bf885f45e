"""`mgvq-report`: a study's record, tables and figures from its finished runs (of a frozen study: from its record); the tables in
READMEs; a report to read."""

import argparse
import sys
from pathlib import Path

from mgvq.analysis.records.layers import collect_layers, layers_path, read_layers, write_layers
from mgvq.analysis.records.records import collect, read_records, write_records
from mgvq.analysis.report import pages_with_tables, with_tables, write_figures, write_tables
from mgvq.errors import UserError
from mgvq.runs.places import checkout, results_folder
from mgvq.studies.plan import expand
from mgvq.studies.spec import read_study


def main() -> None:
    """Entry point: prints what it wrote; exits with 2 where a run is missing or a file is bad."""
    parser = argparse.ArgumentParser(prog="mgvq-report", description=__doc__)
    parser.add_argument("study", type=Path, nargs="?", help="a study file, experiments/*/study.yaml")
    parser.add_argument("--from-records", action="store_true", help="use results/records/, not the run folders")
    parser.add_argument("--html", action="store_true", help="results/reports/STUDY/index.html too: one file, no server")
    parser.add_argument("--paper", action="store_true", help="instead of a study: our numbers beside the published ones")
    arguments = parser.parse_args()
    if (arguments.study is None) != arguments.paper:
        parser.error("one of STUDY and --paper")
    if arguments.paper and (arguments.html or arguments.from_records):
        parser.error("--paper always reads records, and has no HTML")
    results = results_folder()
    try:
        written = _paper(results) if arguments.paper else _study(arguments, results)
    except UserError as error:
        print(f"mgvq-report: {error}", file=sys.stderr)
        sys.exit(2)
    print(*written, sep="\n")
    root = checkout()
    if root and results == root / "results":  # not where MGVQ_RESULTS points
        for page in pages_with_tables(root):
            page.write_text(with_tables(page.read_text(), results / "tables"))


def _study(arguments: argparse.Namespace, results: Path) -> list[Path]:
    study = read_study(arguments.study)
    path, layers_file = results / "records" / f"{study.name}.parquet", layers_path(results, study.name)
    if not (arguments.from_records or study.frozen):
        runs = expand(study)
        write_records(collect(study, runs), path)
        write_layers(collect_layers(runs), layers_file)
    # As written, so rounded: whoever rebuilds the figures starts from these digits.
    records, layers = read_records(path), read_layers(layers_file)
    written = [*write_tables(study.name, records, results), *write_figures(study.name, records, layers, results)]
    if arguments.html:
        from mgvq.analysis.html import write_html  # here: tables need neither Jinja nor pictures

        written.append(write_html(study, records, results))
    return written


def _paper(results: Path) -> list[Path]:
    from mgvq.analysis.tables.paper_tables import write_paper  # here: matplotlib

    return write_paper(results)


if __name__ == "__main__":
    main()
