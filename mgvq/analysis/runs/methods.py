"""The preset that a run is closest to: runs are named by what their settings mean, and not by the words that chose them."""

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from mgvq.runs.build import STAGES
from mgvq.runs.declared import KEY, is_idle
from mgvq.runs.places import conf_folder

_MANY = 4  # differences beyond which no preset describes a run
_DRAWS = ("seed", "label_seed")


def method_of(settings: Mapping[str, Any]) -> str:
    """The name of the closest method preset and the settings in which the run differs, `kmeans codebook.sample=64`; what data it
    was calibrated on, its budget and its seeds do not count. A run that no preset is close to is named by its variants."""
    text = json.dumps({group: _drawless(settings[group]) for group in STAGES if group in settings}, sort_keys=True)
    return _closest(text)


@functools.cache
def _closest(text: str) -> str:
    own = json.loads(text)
    found = {name: list(_differences(preset, own)) for name, preset in _presets().items()}
    name = min(found, key=lambda name: len(found[name]))
    if len(found[name]) <= _MANY:
        return " ".join([name, *found[name]])
    return " ".join(f"{group}={fields.get('variant')}" for group, fields in own.items())


def _drawless(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _DRAWS}


def _differences(preset: Mapping[str, Mapping[str, Any]], own: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for group in STAGES:
        wanted, found = preset.get(group), own.get(group)
        if (wanted or {}).get("variant") != (found or {}).get("variant"):
            yield f"{group}={(found or {}).get('variant', 'none')}"
        elif wanted and found:
            for name in found:
                if name != "variant" and name in wanted and not _same(wanted[name], found[name]):
                    yield f"{group}.{name}={_shown(found[name])}"


def _same(wanted: Any, found: Any) -> bool:
    """Whether a value of a yaml is that of an identity, where numbers are floats; what a yaml looks up elsewhere counts as the
    same."""
    if isinstance(wanted, str) and "${" in wanted:
        return True
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        return wanted.keys() == found.keys() and all(_same(wanted[name], found[name]) for name in wanted)
    if isinstance(wanted, list) and isinstance(found, list):
        return len(wanted) == len(found) and all(map(_same, wanted, found))
    return wanted == found


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@functools.cache
def _presets() -> dict[str, dict[str, dict[str, Any]]]:
    """What every method preset makes of the stages that do something: variant and fields."""
    return {file.stem: _stages(file.stem) for file in sorted((conf_folder() / "method").glob("*.yaml"))}


def _stages(preset: str) -> dict[str, dict[str, Any]]:
    variants, fields = {**_defaults()}, {}
    _read_preset(preset, variants, fields)
    found = {}
    for group in STAGES:
        variant = _yaml(group, variants[group])
        if not is_idle(variant):
            known = {name: value for name, value in variant.items() if name not in ("_target_", KEY)}
            found[group] = {"variant": variants[group], **known, **fields.get(group, {})}
    return found


def _read_preset(preset: str, variants: dict[str, str], fields: dict[str, dict[str, Any]]) -> None:
    """Adds what a preset, and those that it starts from, choose and set."""
    content = _yaml("method", preset)
    for entry in content.get("defaults", ()):
        if isinstance(entry, str):
            if entry != "_self_":
                _read_preset(entry, variants, fields)
        else:
            variants |= {key.removeprefix("override").strip().lstrip("/"): value for key, value in entry.items()}
    for group, own in content.items():
        if group in STAGES:
            fields[group] = {**fields.get(group, {}), **own}


@functools.cache
def _defaults() -> dict[str, str]:
    """The variant of every group without a preset, as `config.yaml` has it."""
    content = yaml.safe_load((conf_folder() / "config.yaml").read_text(encoding="utf-8"))
    return {name: value for entry in content["defaults"] if isinstance(entry, dict) for name, value in entry.items()}


@functools.cache
def _yaml(group: str, variant: str) -> dict[str, Any]:
    return yaml.safe_load((conf_folder() / group / f"{variant}.yaml").read_text(encoding="utf-8")) or {}
