"""A study file as YAML: read with every key once, and with values of the shapes that a study is made of."""

import difflib
import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mgvq.errors import UserError


def read_settings(path: Path, *, known: Sequence[str], required: Sequence[str]) -> dict[str, Any]:
    """The settings of a study file.

    Raises UserError, naming the file, where it is missing or no YAML mapping, where a key is unknown, missing or there twice, and
    where a value has another shape than it should: YAML takes `1:` for a number and `on:` for a truth, where a name was meant.
    """
    if not path.is_file():
        raise UserError(f"{path} is no study file; the studies lie in experiments/*/study.yaml of the repository.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        node = yaml.compose(text, yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        told = " ".join(str(error).split())
        raise UserError(f"{path} is no study file, since it cannot be read as YAML: {told}") from error
    if not isinstance(node, yaml.MappingNode):
        what = "empty" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise UserError(f"{path} is no study file: it is {what}, and should be a mapping with the keys {', '.join(required)}.")
    try:
        problems = [*_repeated(node)]
        settings = yaml.safe_load(text)
    except RecursionError as error:
        raise UserError(f"{path} is no valid study: a part of it contains itself.") from error
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no valid study: {' '.join(str(error).split())}") from error
    # One after the other: a later check relies on the earlier ones.
    problem = next(itertools.chain(problems, _about_keys(settings, known, required), _about_shapes(settings)), None)
    if problem is not None:
        raise UserError(f"{path} is no valid study: {problem}")
    return settings


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
    lines: dict[tuple[Hashable, str], list[int]] = {}
    for node in nodes:
        if isinstance(node, yaml.ScalarNode):
            lines.setdefault((node.tag, node.value), []).append(node.start_mark.line + 1)
    for (_, value), found in lines.items():
        if len(found) > 1:
            where = f"lines {' and '.join(map(str, found))}" if len(set(found)) > 1 else f"line {found[0]}"
            yield f"{value!r} stands {len(found)} times as {what}, in {where}: leave one."


def _about_keys(settings: Mapping[Any, Any], known: Sequence[str], required: Sequence[str]) -> Iterator[str]:
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            meant = f"; did you mean {near[0]}?" if near else "."
            yield f"it has the unknown key {key!r}{meant} There are {', '.join(known)}."
    if absent := [name for name in required if name not in settings]:
        yield f"it lacks {', '.join(absent)}."


_SHAPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "name": (str, "text"),
    "question": (str, "text"),
    "arms": (dict, "a mapping of lists"),
    "seeds": ((list, dict), "a list, or a mapping of lists"),
    "common": (list, "a list"),
    "grid": (dict, "a mapping of lists"),
    "baseline": ((str, list, type(None)), "the name of an arm, or a list of them"),
    "primary": ((dict, type(None)), "{arm: ..., metric: ...}"),
    "spread": ((str, type(None)), "text"),
    "trainings": ((str, type(None)), "text"),
    "also": (list, "a list of study files"),
    "frozen": ((str, type(None)), "7 to 40 hex digits of a commit, in quotes"),
    "only": (dict, "a mapping {ARM: {KEY: [VALUE, ...]}}"),
}


def _about_shapes(settings: Mapping[str, Any]) -> Iterator[str]:
    """Values that are not of the shape that their key has."""
    for name, (kind, words) in _SHAPES.items():
        if name in settings and not isinstance(settings[name], kind):
            yield f"{name} must be {words}, got {settings[name]!r}."
    for name, what in {"arms": "an arm", "grid": "a key of the grid", "only": "an arm", "primary": "a key"}.items():
        for key in settings.get(name) or {}:
            if not isinstance(key, str):
                yield f"{name} has {key!r}, but the name of {what} must be text: write '{key}'."
    seeds = settings.get("seeds")
    lists = {**settings["arms"], **settings.get("grid", {}), **(seeds if isinstance(seeds, dict) else {})}
    for name, value in lists.items():
        if not isinstance(value, list):
            yield f"{name} must be a list, got {value!r}."
    for name, words in {"common": settings.get("common", []), **settings["arms"]}.items():
        for word in words:
            if not isinstance(word, str):
                yield f"{name} must list overrides KEY=VALUE as text, got {word!r}."
    for name in settings.get("also", []):
        if not isinstance(name, str):
            yield f"also must list study files as text, got {name!r}."
    for arm, keys in settings.get("only", {}).items():
        if not isinstance(keys, dict) or not all(isinstance(values, list) for values in keys.values()):
            yield f"only {arm} must be {{KEY: [VALUE, ...]}}, got {keys!r}."
    for own in seeds.values() if isinstance(seeds, dict) else [seeds]:
        for seed in own if isinstance(own, list) else []:
            if type(seed) is not int or seed < 0:
                yield f"seeds must be whole numbers >= 0, got {seed!r}."
    baseline = settings.get("baseline")
    if isinstance(baseline, list) and not all(isinstance(arm, str) for arm in baseline):
        yield f"baseline must be the name of an arm, or a list of them, got {baseline!r}."
    if isinstance(primary := settings.get("primary"), dict) and not all(isinstance(v, str) for v in primary.values()):
        yield f"primary must be {{arm: ..., metric: ...}}, both of them text, got {primary!r}."
