"""From the configuration to objects: the one place that calls Hydra's instantiate, and the checks before any work."""

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mgvq.errors import UserError

MIN_BITS, MAX_BITS = 0.05, 8.5
SCOPES = ("language", "language_projector", "all")
GROUPS = ("paths", "model", "calibration", "curvature", "allocation", "codebook", "evaluation", "tracker", "budget")
SETTINGS = {*GROUPS, "seed", "scope", "threads", "device", "numerics"}


def build(cfg: DictConfig, group: str) -> Any:
    """The component of one group, None where the group is `none`. Its own errors come through as they are."""
    if not chosen(cfg, group):
        return None
    try:
        return instantiate(cfg[group], _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"group {group} ({cfg[group]['_target_']}) cannot be built: {error.__cause__ or error}") from error


def chosen(cfg: DictConfig, group: str) -> bool:
    """Whether the group has a variant other than `none`."""
    return cfg[group].get("_target_") is not None


def check(cfg: DictConfig) -> None:
    """Settings that no single group can judge; raises UserError before a model is loaded."""
    try:
        OmegaConf.resolve(cfg.copy())
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration cannot be resolved: {error}") from error
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise UserError(f"{' and '.join(missing)} must be given: {' '.join(f'{key}=...' for key in missing)}")
    for key in ("seed", "threads"):
        least = 0 if key == "seed" else 1
        if not (type(cfg[key]) is int and cfg[key] >= least):
            raise UserError(f"{key} must be a whole number >= {least}, got {cfg[key]!r}")
    if cfg.scope not in SCOPES:
        raise UserError(f"scope must be one of {', '.join(SCOPES)}; got {cfg.scope!r}")
    if unknown := sorted(set(map(str, cfg)) - SETTINGS):
        raise UserError(f"{', '.join(unknown)}: there is no such setting, so it would have no effect; leave it out.")
    for group in GROUPS:
        if cfg[group] is None:
            raise UserError(f"{group}=null is no variant; {group}=none is the one that leaves it out.")
    quantizes, bits = chosen(cfg, "codebook"), cfg.budget.bits_per_weight
    if not quantizes and (bits is not None or chosen(cfg, "allocation")):
        raise UserError(
            f"nothing is quantised (codebook=none), so budget.bits_per_weight={bits} and the allocation have no effect: "
            "leave them out, or choose a codebook."
        )
    if quantizes and not _is_bit_width(bits):
        raise UserError(
            f"budget.bits_per_weight={bits} is no bit width: give a number of {MIN_BITS} to {MAX_BITS}, the stored bits for "
            "each quantised weight with tables and scales."
        )
    if quantizes and not chosen(cfg, "allocation"):
        raise UserError("allocation=none with a codebook: choose allocation=uniform, or method=full_precision.")
    if chosen(cfg, "calibration") != chosen(cfg, "curvature"):
        raise UserError(
            "calibration and curvature go together: data without statistics has no effect, statistics without data cannot be "
            f"taken. Got calibration {_state(cfg, 'calibration')}, curvature {_state(cfg, 'curvature')}."
        )
    weighted = bool(cfg.codebook.get("weight_power", 0))
    if chosen(cfg, "curvature") and not weighted:
        raise UserError(
            "calibration and curvature have no effect: nothing in this run uses the statistics. Leave them out, or set "
            "codebook.weight_power above 0."
        )
    if weighted and not chosen(cfg, "curvature"):
        raise UserError(
            f"codebook.weight_power={cfg.codebook.weight_power} weighs channels by their activations: add curvature=input and a "
            "calibration set such as calibration=tiny_vqa, or set it to 0."
        )


def _is_bit_width(bits: Any) -> bool:
    return isinstance(bits, int | float) and not isinstance(bits, bool) and MIN_BITS <= bits <= MAX_BITS


def _state(cfg: DictConfig, group: str) -> str:
    return "set" if chosen(cfg, group) else "none"
