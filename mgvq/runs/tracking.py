"""Trackers: mirrors of a finished run's metrics. The run folder is the truth; losing a tracker loses nothing."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Csv:
    """Appends one row a metric to a CSV file with the columns `run, metric, value`."""

    path: str

    def __call__(self, run: str, metrics: Mapping[str, Any]) -> None:
        file = Path(self.path)
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = not file.exists()
        with file.open("a", newline="") as stream:
            writer = csv.writer(stream)
            if fresh:
                writer.writerow(["run", "metric", "value"])
            writer.writerows([run, name, value] for name, value in metrics.items())
