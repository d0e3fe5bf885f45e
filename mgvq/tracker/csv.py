"""All metrics of all runs in one CSV file."""

import csv
import fcntl
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Csv:
    """Appends one row a metric to a CSV file with the columns `run, metric, value`; a run that has rows gets no others."""

    path: str

    @property
    def place(self) -> str:
        return f"csv {Path(self.path).absolute()}"

    def __call__(self, run: Path) -> None:
        file = Path(self.path)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a+", newline="", encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # until it is closed: runs side by side share the file
            stream.seek(0)
            told = {row[0] for row in csv.reader(stream) if row}
            writer = csv.writer(stream)
            if not told:
                writer.writerow(["run", "metric", "value"])
            if run.name not in told:
                metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
                writer.writerows([run.name, name, value] for name, value in metrics.items())
