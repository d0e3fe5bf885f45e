"""The name of a run: a hash of what its settings mean, as far as that can change its numbers."""

import copy
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mgvq.errors import UserError
from mgvq.runs.build import STAGES, build
from mgvq.runs.declared import KEY, declared, is_idle
from mgvq.runs.device import device_type
from mgvq.runs.digests import data_digest

# Where a run happens and what is told about it. `seed` counts through the groups that draw with it (`codebook.seed: ${seed}`):
# a method in which nothing is random has one run for all seeds. `memory` moves no bit.
NOT_IN_IDENTITY = ("hydra", "paths", "tracker", "variants", "seed", "dry", "objective", "memory")
# Settings outside the groups that came later, and the value that leaves a run as it was: such a run keeps the name that it had.
# The rules of a group are declared in its yaml, and a group that came later does not count where it is idle.
NEUTRAL: Mapping[str, Any] = {"outliers": 0, "embedding_bits": None}
_AS_IT_IS = "as it is"


def scientific_settings(cfg: DictConfig) -> dict[str, Any]:
    """The settings that count, numbers in one spelling (2 is 2.0).

    A group counts by the name of its variant (`variants`, see `mgvq.runs.compose`), by its fields, and by how often the code of
    the variant has moved its numbers (`numerics` under `_declares_`); a model by what determines its weights. Variants that do
    nothing do not count. Raises UserError where the model's files are missing.
    """
    whole = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(whole, dict)
    settings: dict[str, Any] = {str(name): value for name, value in whole.items() if name not in NOT_IN_IDENTITY}
    source = _source(json.dumps(settings["model"]))
    settings["model"] = {"name": source.name, "dtype": source.dtype, "weights": source.identity(), **source.choices()}
    settings["device"] = device_type(settings["device"])
    for group in ("calibration", *STAGES, "evaluation"):
        if is_idle(settings[group]):
            del settings[group]
        else:
            moved = {"numerics": number} if (number := declared(settings[group]).get("numerics")) else {}
            settings[group] = {"variant": whole["variants"][group], **moved, **_fields(group, settings[group])}
    if "codebook" not in settings:  # nothing is quantised, in any scope
        del settings["scope"]
    return _canonical({name: value for name, value in settings.items() if name not in NEUTRAL or value != NEUTRAL[name]})


def run_id(cfg: DictConfig) -> str:
    """The name of the run, 16 hex digits: equal for equal settings, in any process and under any launcher."""
    return id_of(scientific_settings(cfg))


def run_ids(cfg: DictConfig, seeds: Sequence[int]) -> list[str]:
    """`run_id` at each of the seeds, the first two of which are worked out; `cfg.seed` is the last of these afterwards.

    What differs between these two is the seed itself, as groups refer to it (`${seed}`), and then the other seeds are put in its
    places; where something else differs, all are worked out.
    """
    worked_out = [_at_seed(cfg, seed) for seed in seeds[:2]]
    if len(seeds) > 2:
        places = _places(worked_out[0], worked_out[1], seeds[0], seeds[1])
        others = [_at_seed(cfg, s) if places is None else _put(worked_out[0], places, s) for s in seeds[2:]]
        worked_out += others
    return [id_of(settings) for settings in worked_out]


def _at_seed(cfg: DictConfig, seed: int) -> dict[str, Any]:
    cfg.seed = seed
    return scientific_settings(cfg)


def _places(first: Any, second: Any, seed: int, other: int) -> list[tuple[Any, ...]] | None:
    """The paths at which the first has `seed` where the second has `other`; None where the two differ in anything else."""
    if first == second:
        return []
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        below = {key: _places(first[key], second[key], seed, other) for key in first}
        if any(paths is None for paths in below.values()):
            return None
        return [(key, *path) for key, paths in below.items() for path in paths or ()]
    return [()] if (first, second) == (seed, other) and not isinstance(first, bool) else None


def _put(settings: Mapping[str, Any], places: Sequence[tuple[Any, ...]], seed: int) -> dict[str, Any]:
    """A copy of the settings with the seed at each of the places."""
    found = copy.deepcopy(dict(settings))
    for *above, last in places:
        inside = found
        for key in above:
            inside = inside[key]
        inside[last] = float(seed)
    return found


def id_of(settings: Mapping[str, Any]) -> str:
    """The name of a run with these `scientific_settings`, which are those in its `identity.json`."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.lru_cache(64)
def _source(settings: str) -> Any:
    """The source of a model, built once for equal settings, since the runs of a study share it; it holds none of its files."""
    return build(OmegaConf.create({"model": json.loads(settings)}), "model")


def _fields(group: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a variant as they count by the rules that its yaml declares (`_declares_: {identity: {FIELD: RULE}}`):

        content                 a file or folder counts by what is in it
        ignored                 the field does not count: it says where something lies, for example
        {neutral: VALUE}        a field that came later: with this value the run is what it was without the field
        {neutral: VALUE, counts: RULE}      and other values count by one of the rules above or below
        PACKAGE.MODULE.NAME     a function of the value and of all fields gives what counts; its module must not import torch

    Fields without a rule count as they are.
    """
    fields = {name: value for name, value in settings.items() if name not in ("_target_", KEY)}
    counted = dict(fields)
    for name, rule in declared(settings).get("identity", {}).items():
        if name not in fields:
            raise UserError(f"{settings['_target_']}: {KEY}.identity.{name} is about no field; {group} has {', '.join(fields)}.")
        value = fields[name]
        if isinstance(rule, Mapping) and "neutral" in rule and set(rule) <= {"neutral", "counts"}:
            if value == rule["neutral"]:
                del counted[name]
                continue
            rule = rule.get("counts", _AS_IT_IS)
        if rule == "ignored":
            del counted[name]
        elif rule == "content":
            counted[name] = None if value is None else data_digest(value)
        elif isinstance(rule, str) and "." in rule:
            counted[name] = _function(rule)(value, fields)
        elif rule != _AS_IT_IS:
            raise UserError(
                f"{settings['_target_']}: {KEY}.identity.{name} must be content, ignored, {{neutral: VALUE}} or the path of a "
                f"function, got {rule!r}"
            )
    return counted


def _function(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{KEY}.identity names the function {path}, which cannot be imported: {error}") from error


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return value
