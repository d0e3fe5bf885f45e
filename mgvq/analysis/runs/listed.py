"""The runs of a results folder, each by method, model, seed, score and date.

What is read of a run is `DONE`, `identity.json` and `metrics.json`: thousands of runs are listed in a second or two.
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from mgvq.analysis.runs.methods import method_of
from mgvq.errors import UserError
from mgvq.runs.store import RunFolder
from mgvq.studies.kinds import kind_of_metrics

NOTHING = "-"  # a column for which a run has no value
_DRAWS_ELSEWHERE = ("evaluation", "model")  # whose seeds are not the run's


@dataclass(frozen=True)
class ListedRun:
    """A finished run."""

    folder: RunFolder
    """Its folder."""
    settings: Mapping[str, Any]
    """`identity.json`: the settings that can move its numbers, by group."""
    metrics: Mapping[str, Any]
    """`metrics.json`."""

    @property
    def id(self) -> str:
        """Its name."""
        return self.folder.path.name

    @cached_property
    def date(self) -> datetime:
        """When it was done, by the clock of the machine that wrote DONE, in local time."""
        return datetime.fromtimestamp((self.folder.path / "DONE").stat().st_mtime)

    @property
    def model(self) -> str:
        """The name of its model."""
        return str(self.settings.get("model", {}).get("name", NOTHING))

    @cached_property
    def method(self) -> str:
        """The preset that it is closest to, with what it departs in."""
        return method_of(self.settings)

    @property
    def seed(self) -> str:
        """The seed that its parts drew with, several where they differ; `-` where nothing was drawn."""
        return "/".join(f"{seed:g}" for seed in self.seeds) or NOTHING

    @property
    def seeds(self) -> list[float]:
        """The same as numbers, ascending."""
        groups = (own for name, own in self.settings.items() if isinstance(own, Mapping) and name not in _DRAWS_ELSEWHERE)
        return sorted({own["seed"] for own in groups if own.get("seed") is not None})

    @property
    def metric(self) -> str:
        """The metric that stands for the whole; `-` for an evaluation that `conf/` does not have."""
        try:
            return kind_of_metrics(self.metrics).headline
        except UserError:
            return NOTHING

    @property
    def score(self) -> float | None:
        """The value of `metric`; None where it was not finite."""
        return self.metrics.get(self.metric)

    @cached_property
    def flat(self) -> dict[str, Any]:
        """The settings by their dotted names; a group by its variant."""
        return dict(flat(self.settings))


def flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by their dotted names; a group that has a `variant` has that under its own name."""
    for name, value in settings.items():
        path = f"{above}{name}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}.")
        else:
            yield (above.removesuffix(".") if name == "variant" and above else path), value


def read_run(path: Path) -> ListedRun:
    """Raises UserError for a folder without a finished run, and where one of the files read is not the one that the run wrote."""
    folder = RunFolder(path)
    metrics = folder.metrics()
    folder.verify("identity.json")
    return ListedRun(folder, json.loads((path / "identity.json").read_text(encoding="utf-8")), metrics)


def read_runs(runs: Path) -> tuple[list[ListedRun], list[str], int]:
    """The finished runs of a folder of runs, what is wrong with those that cannot be used, and the number of unfinished ones."""
    found, faults, unfinished = [], [], 0
    for path in sorted(runs.iterdir()) if runs.is_dir() else ():
        if path.name.startswith(".") or not path.is_dir():
            continue
        if not (path / "DONE").is_file():
            unfinished += 1
            continue
        try:
            found.append(read_run(path))
        except (UserError, OSError, ValueError) as error:
            faults.append(str(error))
    return found, faults, unfinished


def find_run(name: str, runs: Path) -> ListedRun:
    """The finished run that a path, an id or the beginning of one names.

    Raises UserError where none or several are named, or the one is not finished or damaged.
    """
    if name and (path := Path(name)).is_dir():
        return read_run(path.absolute())
    ids = sorted(path.name for path in runs.iterdir() if path.is_dir() and path.name.startswith(name)) if runs.is_dir() else []
    if not name or name.startswith(".") or not ids:
        raise UserError(f"{name}: no run in {runs} has an id that begins so, and there is no such folder; see mgvq-runs list.")
    if len(ids) > 1:
        raise UserError(
            f"{name} begins the ids of {len(ids)} runs: {', '.join(ids[:5])}{' ...' * (len(ids) > 5)}. Give more of it."
        )
    return read_run(runs / ids[0])


SORTS = {
    "method": lambda run: run.method,
    "model": lambda run: run.model,
    "seed": lambda run: run.seeds,
    "score": lambda run: (run.metric, run.score is not None, run.score),
    "date": lambda run: run.date,
}


def chosen(runs: Sequence[ListedRun], filters: Iterable[str], sort: str = "date") -> list[ListedRun]:
    """The runs that meet all filters KEY=VALUE, in the order of a key of `SORTS`.

    KEY is method, model, seed, or the name of a setting (`codebook`, `budget.bits_per_weight`); VALUE a number, or a text in
    which `*` stands for anything. Raises UserError for a filter of another form, and for a key that no run has.
    """
    kept = list(runs)
    for word in filters:
        key, equals, wanted = word.partition("=")
        if not (key and equals):
            raise UserError(f"{word} is no filter: give KEY=VALUE, model=tiny_* or codebook=kmeans for example.")
        values = [(run, _value(run, key)) for run in kept]
        if runs and not any(_value(run, key) is not None for run in runs):
            names = sorted({"method", "model", "seed", *(name for run in runs for name in run.flat)})
            near = difflib.get_close_matches(key, names, 1)
            raise UserError(f"{key}: no run here has such a setting{f'; is {near[0]} meant?' if near else '.'}")
        kept = [run for run, value in values if value is not None and _meets(value, wanted)]
    return sorted(kept, key=SORTS[sort])


def _value(run: ListedRun, key: str) -> Any:
    own = {"method": lambda: run.method, "model": lambda: run.model, "seed": lambda: run.seed}
    return own[key]() if key in own else run.flat.get(key)


def _meets(value: Any, wanted: str) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(wanted) == value
        except ValueError:
            return False
    text = json.dumps(value) if not isinstance(value, str) else value
    return fnmatchcase(text, wanted)
