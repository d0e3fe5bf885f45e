"""The study file: which runs make a claim. What one run is stays in `conf/`."""

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from mgvq.errors import UserError

METRICS = ("accuracy", "loss", "perplexity")


@dataclass(frozen=True, kw_only=True)
class Study:
    """`common` overrides of every run, `arms` by name, `grid` of values that every arm is run at, and the seeds.

    Arms are rows of the table, values of the grid its sections. An arm's own override of a key of the grid wins over the grid's.
    An arm in which nothing is random is one run for all seeds. `seeds` may be a list for each value of one key of the grid.
    The other arms are compared with the `baseline`, if there is one; of several, each makes a table. `primary: {arm: ...,
    metric: accuracy | loss | perplexity}` names the one comparison with the first of them that was planned before a run was
    started, which is therefore not corrected for the others. `spread` names the arm that draws everything anew with the seed,
    where the others draw one thing each: a study of seeds has a table of spreads beside the usual one. `trainings` names the
    key of the grid, its only one, whose values are one model trained from several seeds: another table then tells how much of
    what is seen belongs to the model and how much to its quantising. `only` has arms that are run at some values of a grid key
    alone: `{arm: {key: [value, ...]}}`.
    """

    name: str
    question: str
    arms: dict[str, list[str]]
    seeds: list[int] | dict[Any, list[int]]
    common: list[str] = field(default_factory=list)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    baseline: str | list[str] | None = None
    primary: dict[str, str] | None = None
    spread: str | None = None
    trainings: str | None = None
    only: dict[str, dict[str, list[Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_types()
        self._check_names()
        for name, least in (("arms", self.arms), ("seeds", self.seeds), *self.grid.items()):
            if not least:
                raise UserError(f"study {self.name}: {name} is empty, so there is nothing to run.")
        self._check_lists()
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

    def _check_types(self) -> None:
        """What YAML makes of a value that was meant otherwise: `arms: {1: [...]}` names an arm by a number."""
        if not isinstance(self.name, str):
            raise UserError(f"name must be text, got {self.name!r}: write it in quotes.")
        shapes = {"question": str, "arms": dict, "seeds": (list, dict), "common": list, "grid": dict, "only": dict}
        words = {str: "text", dict: "a mapping", list: "a list", (list, dict): "a list, or a mapping of lists"}
        for name, kind in shapes.items():
            if not isinstance(value := getattr(self, name), kind):
                raise UserError(f"study {self.name}: {name} must be {words[kind]}, got {value!r}.")
        for name, what in {"arms": "an arm", "grid": "a key of the grid", "only": "an arm"}.items():
            for key in getattr(self, name):
                if not isinstance(key, str):
                    raise UserError(f"study {self.name}: {name} has {key!r}, but the name of {what} must be text: write '{key}'.")
        for arm, keys in self.only.items():
            if not isinstance(keys, dict) or not all(isinstance(values, list) for values in keys.values()):
                raise UserError(f"study {self.name}: only {arm} must be {{KEY: [VALUE, ...]}}, got {keys!r}.")
        for name in ("spread", "trainings"):
            if not isinstance(value := getattr(self, name), str | None):
                raise UserError(f"study {self.name}: {name} must be text, got {value!r}.")
        if not all(isinstance(baseline, str) for baseline in self.baselines):
            raise UserError(f"study {self.name}: baseline must be the name of an arm, or a list of them; got {self.baseline!r}.")

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

    def _check_lists(self) -> None:
        """Lists are lists, of words where they are overrides, and say nothing twice."""
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
        for name, words in {"common": self.common, **self.arms}.items():
            if bad := [word for word in words if not isinstance(word, str)]:
                raise UserError(f"study {self.name}: {name} must list overrides KEY=VALUE as text, got {bad[0]!r}.")
        own = self.seeds.items() if isinstance(self.seeds, dict) else [("seeds", self.seeds)]
        for name, seeds in own:
            if bad := [seed for seed in seeds if not (type(seed) is int and seed >= 0)]:
                raise UserError(f"study {self.name}: seeds must be whole numbers >= 0, got {bad[0]!r}.")
            if not seeds:
                raise UserError(f"study {self.name}: seeds of {name} is empty, so there is nothing to run.")
        for name, values in (*own, *self.grid.items(), ("baseline", self.baselines)):
            if twice := [value for value, number in Counter(map(str, values)).items() if number > 1]:
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
        """None, one or several arms."""
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
        """Those of one combination of the grid's values."""
        if isinstance(self.seeds, list):
            return self.seeds
        return next(own for value, own in self.seeds.items() if value in point.values())

    @property
    def least_seeds(self) -> int:
        """How many every combination has at least."""
        return min(len(self.seeds_at(point)) for point in self.points())

    def arms_at(self, point: dict[str, Any]) -> list[str]:
        """Those that are run at one combination of the grid's values."""
        left_out = {arm for arm, keys in self.only.items() if any(point[key] not in values for key, values in keys.items())}
        return [arm for arm in self.arms if arm not in left_out]

    def overrides(self, arm: str, point: dict[str, Any]) -> list[str]:
        """Of one cell."""
        own = {word.partition("=")[0].lstrip("+~") for word in self.arms[arm]}
        values = [f"{key}={'null' if value is None else value}" for key, value in point.items() if key not in own]
        return [*self.common, *values, *self.arms[arm]]

    def points(self) -> list[dict[str, Any]]:
        """Every combination of the grid's values."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


def file_part(arm: str) -> str:
    """An arm's name as part of a file's name."""
    return re.sub("[^a-z0-9]+", "_", arm.lower())


def read_study(path: Path) -> Study:
    """Read a study file.

    Raises UserError, naming the file, where it is missing or no YAML mapping, where a key is unknown, missing or there twice, and
    where its values make no study.
    """
    if not path.is_file():
        raise UserError(f"{path} is no study file; the studies lie in experiments/*/study.yaml.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        node = yaml.compose(text, yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        told = " ".join(str(error).split())
        raise UserError(f"{path} is no study file, since it cannot be read as YAML: {told}") from error
    if not isinstance(node, yaml.MappingNode):
        what = "empty" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise UserError(f"{path} is no study file: it is {what}, and should be a mapping with the keys {', '.join(_REQUIRED)}.")
    try:
        for twice in _repeated(node):
            raise UserError(twice)
        settings = yaml.safe_load(text)
        _check_keys(settings)
        return Study(**settings)
    except RecursionError as error:
        raise UserError(f"{path} is no valid study: a part of it contains itself.") from error
    except (UserError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no valid study: {error}") from error


def _check_keys(settings: dict[Any, Any]) -> None:
    known = [f.name for f in fields(Study)]
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            meant = f"; did you mean {near[0]}?" if near else "."
            raise UserError(f"it has the unknown key {key!r}{meant} There are {', '.join(known)}.")
    if absent := [name for name in _REQUIRED if name not in settings]:
        raise UserError(f"it lacks {', '.join(absent)}.")


def _repeated(node: yaml.Node, what: str = "a key") -> Iterator[str]:
    """Keys that stand twice in a mapping, of which YAML would take the last, and seeds that stand twice, with their lines."""
    if isinstance(node, yaml.MappingNode):
        yield from _twice([key for key, _ in node.value], what)
        for key, value in node.value:
            if key.value == "seeds":
                for part in [value, *(own for _, own in value.value)] if isinstance(value, yaml.MappingNode) else [value]:
                    if isinstance(part, yaml.SequenceNode):
                        yield from _twice(part.value, "a seed")
            yield from _repeated(value, "an arm" if key.value == "arms" else "a key")
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _repeated(value)


def _twice(nodes: Sequence[yaml.Node], what: str) -> Iterator[str]:
    lines: dict[Hashable, list[int]] = {}
    for node in nodes:
        if isinstance(node, yaml.ScalarNode):
            lines.setdefault((node.tag, node.value), []).append(node.start_mark.line + 1)
    for (_, value), found in lines.items():  # type: ignore[misc]
        if len(found) > 1:
            where = f"lines {' and '.join(map(str, found))}" if len(set(found)) > 1 else f"line {found[0]}"
            yield f"{value!r} stands {len(found)} times as {what}, in {where}: leave one."


_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_REQUIRED = tuple(f.name for f in fields(Study) if f.default is MISSING and f.default_factory is MISSING)
