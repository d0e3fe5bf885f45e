"""`mgvq-report`: a study's record and tables (md, csv, tex) from its finished runs, and the tables in README.md."""

import argparse
import sys
from pathlib import Path

from mgvq.analysis.records import collect, read_records, write_records
from mgvq.analysis.report import with_tables, write_tables
from mgvq.errors import UserError
from mgvq.runs.places import checkout, results_folder
from mgvq.studies.plan import expand
from mgvq.studies.spec import read_study


def main() -> None:
    """Entry point: exits with 2 where a run is missing."""
    parser = argparse.ArgumentParser(prog="mgvq-report", description=__doc__)
    parser.add_argument("study", type=Path, help="a study file, experiments/*/study.yaml")
    parser.add_argument("--from-records", action="store_true", help="use results/records/, not the run folders")
    arguments = parser.parse_args()
    results = results_folder()
    try:
        study = read_study(arguments.study)
        path = results / "records" / f"{study.name}.parquet"
        if arguments.from_records:
            records = read_records(path)
        else:
            records = collect(study, expand(study))
            write_records(records, path)
    except UserError as error:
        print(f"mgvq-report: {error}", file=sys.stderr)
        sys.exit(2)
    print(*write_tables(study.name, records, results), sep="\n")
    root = checkout()
    if root and results == root / "results":  # not where MGVQ_RESULTS points
        readme = root / "README.md"
        readme.write_text(with_tables(readme.read_text(), results / "tables"))


if __name__ == "__main__":
    main()
