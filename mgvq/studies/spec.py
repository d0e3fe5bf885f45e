"""The study file: which runs make a claim. What one run is stays in `conf/`."""

import itertools
import re
import unicodedata
from collections import Counter
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from mgvq.errors import UserError
from mgvq.runs.overrides import key_of, override
from mgvq.studies.yaml_file import read_settings

METRICS = ("accuracy", "loss", "perplexity")


@dataclass(frozen=True, kw_only=True)
class Study:
    """The runs that make a claim: every arm at every point of a grid, with several seeds.

    Raises UserError where the parts do not fit together.
    """

    name: str
    """The name of its record, tables and figures."""
    question: str
    """What the study asks, in a sentence."""
    arms: dict[str, list[str]]
    """Overrides by the name of the arm, which is a row of the table. An arm's own override of a key of the grid wins over the
    grid's. An arm in which nothing is random is one run for all seeds."""
    seeds: list[int] | dict[Any, list[int]]
    """The seeds, or those for each value of one key of the grid."""
    common: list[str] = field(default_factory=list)
    """Overrides of every run."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Values by the setting, which reach the run as YAML has them, without quotes for Hydra; every combination, a point, is a
    section of the table and has all arms."""
    baseline: str | list[str] | None = None
    """The arm that the others are compared with, if there is one; of several, each makes a table."""
    primary: dict[str, str] | None = None
    """`{arm: ..., metric: accuracy | loss | perplexity}`: the one comparison with the first baseline that was planned before a
    run was started, which is therefore not corrected for the others."""
    spread: str | None = None
    """The arm that draws everything anew with the seed, where the others draw one thing each: such a study of seeds has a table
    of spreads beside the usual one."""
    trainings: str | None = None
    """The key of the grid, its only one, whose values are one model trained from several seeds: another table then tells how much
    of what is seen belongs to the model and how much to its quantising."""
    only: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    """Arms that are run at some values of a grid key alone: `{arm: {key: [value, ...]}}`."""
    also: list[str] = field(default_factory=list)
    """Other study files, from this one's folder, that are run and reported with it: the same question, put to models that are
    evaluated otherwise, so that their tables are their own."""
    frozen: str | None = None
    """The commit whose code has run the study, which is not run again: it is reported from its record alone, since today's
    code may give its runs other names or other numbers. None: the study is run."""

    def __post_init__(self) -> None:
        self._check_names()
        if self.frozen is not None and not _COMMIT.fullmatch(self.frozen):
            raise UserError(f"study {self.name}: frozen must be 7 to 40 hex digits of a commit, in quotes, got {self.frozen!r}.")
        for name, least in (("arms", self.arms), ("seeds", self.seeds), *self.grid.items()):
            if not least:
                raise UserError(f"study {self.name}: {name} is empty, so there is nothing to run.")
        self._check_lists()
        self._check_overrides()
        for baseline in self.baselines:
            if baseline not in self.arms:
                raise UserError(f"study {self.name}: baseline must be one of the arms {', '.join(self.arms)}; got {baseline!r}.")
        self._check_baselines()
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

    def _check_names(self) -> None:
        """Names of studies become names of files, and names of arms cells of tables."""
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"study {self.name!r}: its name is the name of its files, and so must be 1 to 80 letters, digits, `_` and `-`, "
                "not beginning with `-`."
            )
        if not self.question.strip():
            raise UserError(f"study {self.name}: question is empty; say in a sentence what the study asks.")
        for arm in self.arms:
            if not arm.strip() or arm != arm.strip() or not arm.isprintable() or len(arm) > 200:
                raise UserError(
                    f"study {self.name}: the arm {arm!r} must be named by 1 to 200 characters that can be printed, without "
                    "blanks before and after."
                )

        looks = [unicodedata.normalize("NFC", arm) for arm in self.arms]
        if same := [arm for arm, look in zip(self.arms, looks, strict=True) if looks.count(look) > 1]:
            raise UserError(f"study {self.name}: two arms look like {same[0]!r}, written in different characters: rename one.")

    def _check_overrides(self) -> None:
        """A seed that is set otherwise than by `seeds` would have no effect, and a dry run leaves nothing to tabulate."""
        lists = {
            "common": self.common,
            "grid": list(self.grid),
            **{f"the arm {arm!r}": words for arm, words in self.arms.items()},
        }
        for place, words in lists.items():
            if "seed" in map(key_of, words):
                raise UserError(f"study {self.name}: {place} sets seed, which would have no effect: seeds has the runs' seeds.")
            if "dry" in map(key_of, words):
                raise UserError(
                    f"study {self.name}: {place} sets dry, which runs nothing; mgvq-study --dry shows what would be run."
                )

    def _check_lists(self) -> None:
        """Nothing is named twice, and every point has seeds."""
        if isinstance(self.seeds, dict):
            named, keys = f"study {self.name}: seeds names {', '.join(map(str, self.seeds))}", self._keys_of_seeds(self.seeds)
            if not keys:
                raise UserError(f"{named}, which no key of the grid has as values.")
            if len(keys) > 1:
                raise UserError(f"{named}, which {' and '.join(keys)} of the grid both have as values: give a list of seeds.")
            if self.trainings is not None and len({len(own) for own in self.seeds.values()}) > 1:
                raise UserError(f"{named} with different numbers of seeds: with trainings each value needs as many.")
        own = list(self.seeds.items()) if isinstance(self.seeds, dict) else [("the study", self.seeds)]
        for name, seeds in own:
            if bad := [seed for seed in seeds if not (type(seed) is int and seed >= 0)]:
                raise UserError(f"study {self.name}: seeds must be whole numbers >= 0, got {bad[0]!r}.")
            if not seeds:
                raise UserError(f"study {self.name}: seeds of {name} is empty, so there is nothing to run.")
        seeds_of = [(f"seeds of {name}", seeds) for name, seeds in own]
        for name, values in (*seeds_of, *self.grid.items(), ("baseline", self.baselines)):
            if twice := [value for place, value in enumerate(values) if value in values[:place]]:  # 2 is 2.0
                raise UserError(f"study {self.name}: {name} names {twice[0]} twice.")

    def _check_baselines(self) -> None:
        """Each baseline but the first has files of its own."""
        files = Counter(map(file_part, self.baselines[1:]))
        if same := [name for name, number in files.items() if number > 1]:
            clash = [baseline for baseline in self.baselines[1:] if file_part(baseline) == same[0]]
            raise UserError(
                f"study {self.name}: the tables against {' and '.join(map(repr, clash))} would both be {self.name}_vs_{same[0]}: "
                "rename an arm."
            )

    @property
    def baselines(self) -> list[str]:
        """The arms that others are compared with; empty, one or several."""
        return self.baseline if isinstance(self.baseline, list) else [self.baseline] if self.baseline else []

    def _check_only(self) -> None:
        """Arms that are run at some points are arms, and the points are of the grid."""
        for arm, keys in self.only.items():
            if arm not in self.arms or arm in self.baselines:
                raise UserError(f"study {self.name}: only names {arm!r}, which is no arm, or a baseline.")
            for key, values in keys.items():
                if not values or not all(value in self.grid.get(key, ()) for value in values):
                    raise UserError(f"study {self.name}: only {arm}: {key} {values} are no values of that key of the grid.")

    def _check_primary(self, primary: dict[str, str]) -> None:
        """The planned comparison is one that can be made."""
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
        (key,) = self._keys_of_seeds(self.seeds)
        return next(own for value, own in self.seeds.items() if value == point[key])

    def _keys_of_seeds(self, seeds: dict[Any, list[int]]) -> list[str]:
        """The keys of the grid whose values are those that `seeds` names."""
        names = list(seeds)
        return [key for key, values in self.grid.items() if len(values) == len(names) and all(name in values for name in names)]

    @property
    def least_seeds(self) -> int:
        """How many seeds every combination of the grid's values has at least."""
        return min(len(self.seeds_at(point)) for point in self.points())

    def arms_at(self, point: dict[str, Any]) -> list[str]:
        """The arms that are run at one combination of the grid's values."""
        left_out = {arm for arm, keys in self.only.items() if any(point[key] not in values for key, values in keys.items())}
        return [arm for arm in self.arms if arm not in left_out]

    def overrides(self, arm: str, point: dict[str, Any]) -> list[str]:
        """The overrides of one arm at one combination of the grid's values."""
        own = set(map(key_of, self.arms[arm]))
        values = [override(key, value) for key, value in point.items() if key not in own]
        return [*self.common, *values, *self.arms[arm]]

    def points(self) -> list[dict[str, Any]]:
        """Every combination of the grid's values."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


def read_studies(path: Path) -> list[Study]:
    """A study, and behind it those that it names in `also`.

    Raises UserError as `read_study` does, and where one of these names others in turn or has a name that was there before.
    """
    first = read_study(path)
    studies = [first]
    for name in first.also:
        other = read_study(path.parent / name)
        if other.also:
            raise UserError(f"{path}: also names {name}, which has `also` of its own: name all of them in one of the files.")
        if other.name in {study.name for study in studies}:
            raise UserError(f"{path}: also names {name}, whose study is called {other.name} too: their files would be the same.")
        studies.append(other)
    return studies


def file_part(arm: str) -> str:
    """An arm's name as part of a file's name."""
    return re.sub("[^a-z0-9]+", "_", arm.lower())


def read_study(path: Path) -> Study:
    """Read a study file.

    Raises UserError, naming the file, where it is missing or no YAML mapping, where a key is unknown, missing or there twice, and
    where its values make no study.
    """
    required = [f.name for f in fields(Study) if f.default is MISSING and f.default_factory is MISSING]
    settings = read_settings(path, known=[f.name for f in fields(Study)], required=required)
    try:
        return Study(**settings)
    except (UserError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no valid study: {error}") from error


_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
