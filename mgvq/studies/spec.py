"""The study file: which runs make a claim. What one run is stays in `conf/`."""

import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mgvq.errors import UserError

METRICS = ("accuracy", "loss", "perplexity")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study as its file says it. Arms are the rows of its table, values of the grid the sections.

    Raises UserError for values that make no study.
    """

    name: str
    """The name of the study's folder, of its record, its tables and its figures."""

    question: str
    """What the study answers, in one sentence."""

    arms: dict[str, list[str]]
    """The overrides of every arm, by its name. An arm in which nothing is random is one run for all seeds."""

    seeds: list[int] | dict[Any, list[int]]
    """The seeds of every arm; or a list for each value of one key of the grid."""

    common: list[str] = field(default_factory=list)
    """The overrides that all runs share."""

    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Settings and their values; every arm is run at every combination. An arm's own override of a key wins over the grid's."""

    baseline: str | list[str] | None = None
    """The arm that the others are compared with; of several, each makes a table."""

    primary: dict[str, str] | None = None
    """`{arm: ..., metric: accuracy | loss | perplexity}`: the one comparison with the first baseline that was planned before a
    run was started, and is therefore not corrected for the other arms."""

    spread: str | None = None
    """The arm that draws everything anew with the seed, where the others draw one thing each; it makes a table of spreads."""

    trainings: str | None = None
    """The only key of the grid, whose values are one model trained from several seeds; it makes a table that tells how much of
    what is seen belongs to the model and how much to its quantising."""

    only: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    """The arms that are run at some values of a key of the grid alone: `{arm: {key: [value, ...]}}`."""

    frozen: str | None = None
    """The commit whose code has run the study, which is not run again: it is reported from its record alone, since today's
    code may give its runs other names or other numbers. None: the study is run."""

    def __post_init__(self) -> None:
        if self.frozen is not None and not (isinstance(self.frozen, str) and _COMMIT.fullmatch(self.frozen)):
            raise UserError(f"study {self.name}: frozen must be 7 to 40 hex digits of a commit, in quotes, got {self.frozen!r}.")
        for name, least in (("arms", self.arms), ("seeds", self.seeds), *self.grid.items()):
            if not least:
                raise UserError(f"study {self.name}: {name} is empty, so there is nothing to run.")
        lists = {"seeds": self.seeds, "common": self.common, **self.arms, **self.grid}
        if isinstance(self.seeds, dict):
            if set(self.seeds) not in map(set, self.grid.values()):
                raise UserError(
                    f"study {self.name}: seeds names {', '.join(map(str, self.seeds))}, which no key of the grid has as values."
                )
            lists |= {"seeds": list(self.seeds), **{f"seeds of {value}": own for value, own in self.seeds.items()}}
        for name, value in lists.items():
            if not isinstance(value, list):
                raise UserError(f"study {self.name}: {name} must be a list, got {value!r}.")
        own = self.seeds.values() if isinstance(self.seeds, dict) else [self.seeds]
        if bad := [seed for seeds in own for seed in seeds if not (type(seed) is int and seed >= 0)]:
            raise UserError(f"study {self.name}: seeds must be whole numbers >= 0, got {bad[0]!r}.")
        for baseline in self.baselines:
            if baseline not in self.arms:
                raise UserError(f"study {self.name}: baseline must be one of the arms {', '.join(self.arms)}; got {baseline!r}.")
        if self.spread is not None and self.spread not in self.arms:
            raise UserError(f"study {self.name}: spread must be one of the arms {', '.join(self.arms)}; got {self.spread!r}.")
        if self.trainings is not None and (list(self.grid) != [self.trainings] or len(self.points()) < 2 or self.only):
            raise UserError(
                f"study {self.name}: trainings={self.trainings!r} must be the only key of the grid, with two values or more at "
                f"which all arms are run; the grid has {', '.join(self.grid) or 'no key'}."
            )
        self._check_only()
        if self.primary is not None:
            self._check_primary(self.primary)

    @property
    def baselines(self) -> list[str]:
        """The baselines: no arm, one or several."""
        return self.baseline if isinstance(self.baseline, list) else [self.baseline] if self.baseline else []

    def _check_only(self) -> None:
        for arm, keys in self.only.items():
            if arm not in self.arms or arm in self.baselines:
                raise UserError(f"study {self.name}: only names {arm!r}, which is no arm, or a baseline.")
            for key, values in keys.items():
                if not values or not set(values) <= set(self.grid.get(key, ())):
                    raise UserError(f"study {self.name}: only {arm}: {key} {values} are no values of that key of the grid.")

    def _check_primary(self, primary: dict[str, str]) -> None:
        if not self.baselines:
            raise UserError(f"study {self.name}: primary compares an arm with the baseline; name one with baseline: ARM.")
        if not (isinstance(primary, dict) and set(primary) == {"arm", "metric"}):
            raise UserError(f"study {self.name}: primary must be {{arm: ..., metric: {' | '.join(METRICS)}}}, got {primary!r}.")
        others = [arm for arm in self.arms if arm != self.baselines[0]]
        if primary["arm"] not in others:
            raise UserError(f"study {self.name}: primary.arm must be one of {', '.join(others)}; got {primary['arm']!r}.")
        if primary["metric"] not in METRICS:
            raise UserError(f"study {self.name}: primary.metric must be one of {', '.join(METRICS)}; got {primary['metric']!r}.")

    def seeds_at(self, point: dict[str, Any]) -> list[int]:
        """The seeds at one combination of the grid's values."""
        if isinstance(self.seeds, list):
            return self.seeds
        return next(own for value, own in self.seeds.items() if value in point.values())

    @property
    def least_seeds(self) -> int:
        """How many seeds every combination of the grid's values has at least."""
        return min(len(self.seeds_at(point)) for point in self.points())

    def arms_at(self, point: dict[str, Any]) -> list[str]:
        """The arms that are run at one combination of the grid's values."""
        left_out = {arm for arm, keys in self.only.items() if any(point[key] not in values for key, values in keys.items())}
        return [arm for arm in self.arms if arm not in left_out]

    def overrides(self, arm: str, point: dict[str, Any]) -> list[str]:
        """The overrides of an arm at one combination of the grid's values."""
        own = {word.partition("=")[0].lstrip("+~") for word in self.arms[arm]}
        values = [f"{key}={'null' if value is None else value}" for key, value in point.items() if key not in own]
        return [*self.common, *values, *self.arms[arm]]

    def points(self) -> list[dict[str, Any]]:
        """Every combination of the grid's values."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


def frozen_line(commit: str) -> str:
    """The first line of the page of a study that is frozen at the commit."""
    return (
        f"> **Frozen at `{commit}`.** This study is not run again: its tables and figures are made from its record, and commands "
        "and settings on this page are those of that commit."
    )


def read_study(path: Path) -> Study:
    """Raises UserError for a missing file, unknown or missing keys."""
    if not path.is_file():
        raise UserError(f"{path} is no study file; the studies lie in experiments/*/study.yaml.")
    try:
        return Study(**yaml.safe_load(path.read_text()))
    except (TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no valid study: {error}") from error
