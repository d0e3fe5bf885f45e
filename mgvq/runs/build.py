"""From the configuration to objects: the one place that calls Hydra's instantiate, and the checks before any work."""

from collections.abc import Iterator
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mgvq.errors import UserError
from mgvq.runs.declared import KEY, is_idle
from mgvq.runs.device import device_type
from mgvq.runs.fields import wrong_type
from mgvq.runs.offers import check_offers

MIN_BITS, MAX_BITS = 0.05, 8.5
MEMORY = ("resident", "streamed")
SCOPES = ("language", "language_projector", "all")
STAGES = (  # what a method is made of
    *("curvature", "sensitivity", "grouping", "allocation", "codebook", "compensation", "refit"),
    *("transform", "prefix", "tuning"),
)
VARIANTS = ("model", "calibration", *STAGES, "evaluation", "tracker")  # the groups of which a run has a variant each
GROUPS = ("paths", *VARIANTS, "budget")
SETTINGS = {
    *(*GROUPS, "variants", "seed", "scope", "threads", "device", "tf32", "numerics", "dry", "objective"),
    *("outliers", "embedding_bits", "memory"),
}


def build(cfg: DictConfig, group: str) -> Any:
    """Builds the variant of one group; None where that is `none`. Raises UserError, by name where it cannot be built."""
    if not chosen(cfg, group):
        return None
    resolved = OmegaConf.to_container(cfg[group], resolve=True)
    assert isinstance(resolved, dict)
    settings = {str(name): value for name, value in resolved.items() if name != KEY}
    try:
        part = instantiate(settings, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        if wrong := wrong_type(get_object(settings["_target_"]), settings):
            raise UserError(f"{group}.{wrong}.") from error
        raise UserError(f"group {group} ({cfg[group]['_target_']}) cannot be built: {error.__cause__ or error}") from error
    check_offers(part, group)
    return part


def chosen(cfg: DictConfig, group: str) -> bool:
    """Whether the group has a variant with something to build."""
    return cfg[group].get("_target_") is not None


def check(cfg: DictConfig) -> None:
    """Checks the settings that no single group can judge. Raises UserError before anything heavy is imported or loaded."""
    try:
        settings = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration cannot be resolved: {error}") from error
    if missing := sorted(_missing(settings)):
        raise UserError(f"{' and '.join(missing)} must be given: {' '.join(f'{key}=...' for key in missing)}")
    for key in ("seed", "threads"):
        least = 0 if key == "seed" else 1
        if not (type(cfg[key]) is int and cfg[key] >= least):
            raise UserError(f"{key} must be a whole number >= {least}, got {cfg[key]!r}")
    if type(cfg.tf32) is not bool:
        raise UserError(f"tf32 must be true or false, got {cfg.tf32!r}")
    if device_type(cfg.device) == "cpu" and cfg.tf32:
        raise UserError("tf32=true has no effect on device=cpu: leave it out.")
    if cfg.embedding_bits is not None and not (type(cfg.embedding_bits) is int and cfg.embedding_bits in (8, 4)):
        raise UserError(f"embedding_bits must be 8, 4 or null (embedding and head as in the source), got {cfg.embedding_bits!r}")
    if cfg.memory not in MEMORY:
        raise UserError(f"memory must be one of {', '.join(MEMORY)}; got {cfg.memory!r}")
    if cfg.scope not in SCOPES:
        raise UserError(f"scope must be one of {', '.join(SCOPES)}; got {cfg.scope!r}")
    if unknown := sorted(set(map(str, cfg)) - SETTINGS):
        raise UserError(f"{', '.join(unknown)}: there is no such setting, so it would have no effect; leave it out.")
    for group in GROUPS:
        if cfg[group] is None:
            raise UserError(f"{group}=null is no variant; {group}=none is the one that leaves it out.")
        if not isinstance(cfg[group], DictConfig):
            raise UserError(f"{group}={cfg[group]}: {group} has settings, of which one is given as {group}.NAME=VALUE.")
    if chosen(cfg, "codebook"):
        _check_quantising(cfg)
    else:
        _check_full_precision(cfg)


def _missing(settings: Any, name: str = "") -> Iterator[str]:
    """The names of the settings that have to be given. OmegaConf's own search takes longer than all other checks."""
    if settings == MISSING:
        yield name
    elif isinstance(settings, dict):
        for key, value in settings.items():
            yield from _missing(value, f"{name}.{key}" if name else str(key))
    elif isinstance(settings, list):
        for place, value in enumerate(settings):
            yield from _missing(value, f"{name}[{place}]")


def _check_full_precision(cfg: DictConfig) -> None:
    bits = cfg.budget.bits_per_weight
    idle = [group for group in (*STAGES, "calibration") if not is_idle(cfg[group])]
    if bits is not None or idle or cfg.outliers:
        named = [f"budget.bits_per_weight={bits}"] if bits is not None else []
        named += [f"outliers={cfg.outliers}"] if cfg.outliers else []
        raise UserError(
            f"nothing is quantised (codebook=none), so {' and '.join([*named, *idle])} would have no effect: leave it out, or "
            "choose a codebook."
        )


def _check_quantising(cfg: DictConfig) -> None:
    bits = cfg.budget.bits_per_weight
    if not (isinstance(bits, int | float) and not isinstance(bits, bool) and MIN_BITS <= bits <= MAX_BITS):
        raise UserError(
            f"budget.bits_per_weight={bits} is no bit width: give a number of {MIN_BITS} to {MAX_BITS}, the stored bits for "
            "each quantised weight with tables and scales."
        )
    if not (type(cfg.outliers) is int and cfg.outliers >= 0):
        raise UserError(f"outliers must be a whole number >= 0, how many weights a layer keeps exactly; got {cfg.outliers!r}")
    if not chosen(cfg, "allocation"):
        raise UserError("allocation=none with a codebook: choose allocation=uniform, or method=full_precision.")
