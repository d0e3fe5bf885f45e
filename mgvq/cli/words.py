"""The words of `mgvq-run`'s command line, checked before Hydra reads them: what it would say takes 30 lines."""

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from mgvq.errors import UserError
from mgvq.runs.compose import composer
from mgvq.runs.files import check_reachable
from mgvq.runs.overrides import parsed
from mgvq.runs.places import conf_folder

_PRESETS = ("method", "experiment")
_OTHER_CONFIG = ("config_path", "config_name", "config_dir")  # options of Hydra's by which yaml files from elsewhere come in


def check_words(arguments: Sequence[str]) -> None:
    """Raises UserError, one paragraph with the nearest name, for words that are no settings of a run, and SharedFault for a sweep
    whose results cannot be written.

    Of a sweep every variant is checked, and the first combination is composed. Where yaml files from elsewhere are named, only
    the spelling is checked: what they hold is Hydra's to say.
    """
    options, _ = get_args_parser().parse_known_args(list(arguments))
    overrides = [parsed(word) for word in options.overrides]
    if any(getattr(options, name) for name in _OTHER_CONFIG) or any("searchpath" in word for word in options.overrides):
        return
    for override in overrides:
        _check_variants(override)
    cfg = _check_composition(overrides)
    if options.multirun:  # Hydra makes a folder there before the first job
        check_reachable(Path(cfg.paths.results))


def _groups() -> dict[str, list[str]]:
    folders = (f for f in conf_folder().iterdir() if f.is_dir() and f.name != "hydra")
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def _check_variants(override: Override) -> None:
    """Raises UserError for a variant that its group does not have."""
    group = override.key_or_group
    known = _groups().get(group, [])
    if not known:
        return
    if override.is_delete() or "null" in _values(override):
        fix = "leave the word out" if group in _PRESETS else f"{group}=none, where there is one, leaves it out"
        raise UserError(f"{override.input_line}: no run is without this group; {fix}.")
    for value in _values(override):
        if value not in known:
            names = [name for name in known if name != "default"]
            raise UserError(f"{group}={value}: there is no such variant{_nearest(value, names)} There are {', '.join(names)}.")


def _values(override: Override) -> list[str]:
    if override.is_interval_sweep():
        return [str(override.value().start)]  # type: ignore[union-attr]
    value = override.value()
    if isinstance(value, Glob):
        if not (found := value.filter(_groups().get(override.key_or_group, []))):
            raise UserError(f"{override.input_line}: glob chooses among the variants of a group, and none is chosen.")
        return found
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [value] if isinstance(value, str) else ["null" if value is None else override.get_value_element_as_str()]


def _check_composition(overrides: Sequence[Override]) -> DictConfig:
    words = {_one_value(override): override for override in overrides if not override.key_or_group.startswith("hydra")}
    with composer() as compose:
        try:
            return compose(*words)
        except HydraException as error:
            text = " ".join(str(error).split())
            found = re.search(r"Could not (?:override|find) '([^']+)'", text)
            if not found:
                raise UserError(f"{' '.join(words)}: {text}") from error
            key = found[1]
            others = [word for word, override in words.items() if override.key_or_group != key]
            try:
                cfg = compose(*others)
            except HydraException:
                cfg = compose()
            raise UserError(_no_such_setting(key, cfg)) from error


def _one_value(override: Override) -> str:
    """The word itself; of a sweep its first value."""
    if override.is_sweep_override():
        prefix = "+" if override.is_add() else ""
        return f"{prefix}{override.get_key_element().lstrip('+')}={_values(override)[0]}"
    return override.input_line or ""


def _no_such_setting(key: str, cfg: DictConfig) -> str:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if not isinstance(node, DictConfig):
        return f"{key}: there is no such setting{_nearest(parent, map(str, cfg))}"
    shown = [str(k) for k in node if not str(k).startswith("_") and k != "variants"]
    known = shown if parent else [*shown, *_PRESETS]
    near = _nearest(name, known, f"{parent}." if parent else "")
    of = f"{parent}={cfg.variants[parent]}" if parent in cfg.variants else parent or "a run"
    return f"{key}: there is no such setting{near} The settings of {of}: {', '.join(known) or 'none'}."


def _nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, 1, 0.5) or [one for one in known if name and one.startswith(name)]
    return f"; is {prefix}{near[0]} meant?" if near else "."
