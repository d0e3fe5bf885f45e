"""Runs that records have: a study that needs one of them can take it from there, though its folder is gone or was never here."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from mgvq.analysis.records.layers import COLUMNS, layers_path, read_layers
from mgvq.analysis.records.records import RunRecord, StudyRecord, read_record
from mgvq.studies.plan import PlannedRun


class Recorded:
    """All runs in the records of a results folder, by their names.

    The name of a run is a hash of all that can change its numbers (`mgvq.runs.identity`), so that any study's record has the run
    that another study plans; what it cannot tell is the machine. A run that several records have is taken from that of `study`,
    whose other runs are from there too, else from the first by name. Raises UserError, naming the file, for a record that is
    damaged.
    """

    def __init__(self, results: Path, study: str) -> None:
        self._results = results
        paths = sorted((results / "records").glob("*.parquet"), key=lambda path: (path.stem != study, path.stem))
        self._records = {path.stem: read_record(path) for path in paths}
        self._runs: dict[str, tuple[RunRecord, StudyRecord]] = {}
        for record in self._records.values():
            for run in record.runs:
                self._runs.setdefault(run.run, (run, record))

    def __contains__(self, name: object) -> bool:
        return name in self._runs

    def run(self, name: str) -> RunRecord:
        """The run of that name. Raises KeyError where no record has it."""
        return self._runs[name][0]

    def questions(self, name: str) -> pd.DataFrame:
        """What that run answered, as `StudyRecord.questions`. Raises KeyError where no record has the run."""
        return self._runs[name][1].questions

    def layers(self, runs: Sequence[PlannedRun]) -> pd.DataFrame:
        """The rows of `collect_layers` for the cells of which no run has a finished folder.

        A cell is found where a record has one of just these runs, and its study kept the layers; others have no rows.
        """
        cells: dict[tuple[str, str], set[str]] = {}
        finished = set()
        for run in runs:
            key = (json.dumps(run.point), run.arm)
            cells.setdefault(key, set()).add(run.folder.path.name)
            if run.folder.is_done():
                finished.add(key)
        parts = [rows for key, names in cells.items() if key not in finished for rows in self._layers(names, *key)]
        return pd.concat(parts) if parts else pd.DataFrame(columns=COLUMNS)

    def _layers(self, names: set[str], point: str, arm: str) -> Iterator[pd.DataFrame]:
        for study, record in self._records.items():
            for cell in record.cells:
                if {run.run for run in cell.runs} == names:
                    rows = read_layers(layers_path(self._results, study))
                    rows = rows[(rows.point == cell.point.text) & (rows.arm == cell.arm)]
                    if len(rows):
                        yield rows.assign(point=point, arm=arm)
                        return
