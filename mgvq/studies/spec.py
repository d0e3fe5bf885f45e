"""The study file: which runs make a claim. What one run is stays in `conf/`."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mgvq.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Study:
    """`common` overrides of every run, `arms` by name, `grid` of values that every arm is run at, and the seeds.

    Arms are rows of the table, values of the grid its sections. An arm in which nothing is random is one run for all seeds.
    """

    name: str
    question: str
    arms: dict[str, list[str]]
    seeds: list[int]
    common: list[str] = field(default_factory=list)
    grid: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("arms", self.arms), ("seeds", self.seeds), *self.grid.items()):
            if not least:
                raise UserError(f"study {self.name}: {name} is empty, so there is nothing to run.")
        lists = {"seeds": self.seeds, "common": self.common, **self.arms, **self.grid}
        for name, value in lists.items():
            if not isinstance(value, list):
                raise UserError(f"study {self.name}: {name} must be a list, got {value!r}.")

    def points(self) -> list[dict[str, Any]]:
        """Every combination of the grid's values."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


def read_study(path: Path) -> Study:
    """Raises UserError for a missing file, unknown or missing keys."""
    if not path.is_file():
        raise UserError(f"{path} is no study file; the studies lie in experiments/*/study.yaml.")
    try:
        return Study(**yaml.safe_load(path.read_text()))
    except (TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no valid study: {error}") from error
