"""Composed configurations that know which variants they are made of, whoever composed them."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import OverrideType
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mgvq.digest import file_digest
from mgvq.errors import UserError
from mgvq.runs.build import VARIANTS
from mgvq.runs.overrides import parsed
from mgvq.runs.places import conf_folder, register_resolvers


@contextmanager
def composer() -> Iterator[Callable[..., DictConfig]]:
    """Gives a function that composes the configuration of a run from overrides, outside of `@hydra.main`.

    The function raises HydraException for overrides that do not compose. A Hydra that is open in this process is closed.

    Hydra takes a tenth of a second for a configuration, nearly all of it for the choice of variants, which the runs of a study
    mostly share. So every choice is composed once, and values are then put into a copy of it, as Hydra does it.
    """
    register_resolvers()
    GlobalHydra.instance().clear()
    chosen: dict[tuple[str, ...], tuple[DictConfig, Mapping[str, Any]]] = {}

    def compose(*overrides: str) -> DictConfig:
        values = [word for word in overrides if _is_value(word)]
        choosing = tuple(word for word in overrides if word not in values)
        if any("." in word.partition("=")[0] or "={" in word for word in choosing):  # settings that come and go: in their order
            return with_variants(*_composed(*overrides))
        if choosing not in chosen:
            chosen[choosing] = _composed(*choosing)
        cfg, choices = chosen[choosing][0].copy(), chosen[choosing][1]
        try:
            for word in values:
                OmegaConf.update(cfg, parsed(word).key_or_group, parsed(word).value(), merge=True)
        except OmegaConfBaseException:
            cfg, choices = _composed(*overrides)  # Hydra says what is wrong with them
        return with_variants(cfg, choices)

    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        yield compose


def _composed(*overrides: str) -> tuple[DictConfig, Mapping[str, Any]]:
    """Hydra's configuration, without what is Hydra's own, and the names of the variants that were chosen."""
    cfg = hydra.compose("config", list(overrides), return_hydra_config=True)
    choices = cfg.hydra.runtime.choices
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices


def _is_value(word: str) -> bool:
    """Whether the word changes one setting, and chooses, adds or takes away nothing."""
    try:
        override = parsed(word)
    except UserError:  # Hydra says what is wrong with it
        return False
    key = override.key_or_group
    plain = override.type is OverrideType.CHANGE and override.package is None and not override.is_sweep_override()
    return plain and not key.startswith("hydra.") and ("." in key or key in _settings()) and "/" not in key


@functools.cache
def _settings() -> frozenset[str]:
    """The settings outside of groups."""
    settings = yaml.safe_load((conf_folder() / "config.yaml").read_text(encoding="utf-8"))
    return frozenset(name for name, value in settings.items() if not isinstance(value, dict | list))


def with_variants(cfg: DictConfig, choices: Mapping[str, Any]) -> DictConfig:
    """Adds `variants`, the name of every group's variant, to the configuration; runs are told apart by these names.

    `choices` are Hydra's. A variant of `conf/` has the name of its yaml, so that the code behind it may move. A class that is
    set in another way, on the command line or by a yaml from elsewhere, has its path as name, and where its package is not mgvq
    the version of that, or a digest of its code where it has none: `theirs.module.Thing (theirs 1.2)`.
    """
    with open_dict(cfg):
        cfg.variants = {g: _name(g, str(choices[g]), cfg[g].get("_target_")) for g in VARIANTS if cfg.get(g) is not None}
    return cfg


def _name(group: str, choice: str, target: str | None) -> str:
    if target is None:
        return "none"
    if target == _own_target(group, choice):
        return choice
    package, _, _ = target.partition(".")
    return target if package == "mgvq" else f"{target} ({_package(package)})"


@functools.cache
def _own_target(group: str, choice: str) -> str | None:
    """The path of the class that a yaml in `conf/` builds; None where there is no such yaml."""
    file = conf_folder() / group / f"{choice}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")).get("_target_") if file.is_file() else None


@functools.cache
def _package(package: str) -> str:
    """Names the distribution of a package with its version, or the package with a digest of its code where it has no version."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        if names := packages_distributions().get(package):
            return f"{names[0]} {version(names[0])}"
    spec = find_spec(package)
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    if not files and spec and spec.origin:
        files = [Path(spec.origin)]
    return f"{package} {hashlib.sha256(''.join(map(file_digest, files)).encode()).hexdigest()[:16]}"
