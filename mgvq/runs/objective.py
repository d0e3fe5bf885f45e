"""What a run gives back to a sweeper that searches: one of its metrics, or several, by the setting `objective`.

Which metrics an evaluation measures, and whether more of them is better, stands in its yaml
(`_declares_: {metrics: {loss/answer: min}}`; `TASK/*` is all of a family). Every run has those of `OF_EVERY_RUN`.
"""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mgvq.errors import SharedFault, UserError
from mgvq.runs.declared import declared

OF_EVERY_RUN: Mapping[str, str] = {
    "bits/quantized_layers": "min",
    "bits/language_model": "min",
    "bits/model": "min",
    "bytes/checkpoint": "min",
    "time/calibrate_s": "min",
    "time/quantize_s": "min",
    "time/evaluate_s": "min",
    "memory/peak_gb": "min",
}
_WORDS = {"min": "minimize", "max": "maximize"}


def check_objective(cfg: DictConfig, sweeper: Mapping[str, Any]) -> None:
    """Raises SharedFault for an objective that the run will not measure, with the names of those that it will, and where the
    sweeper, Optuna's or one with a `direction` of its kind, has no objective or would search the wrong way.

    An evaluation from elsewhere that does not declare its metrics is believed until it has measured them.
    """
    names, known = _names(cfg), _known(cfg)
    directions = _directions(sweeper)
    if directions and not names:
        raise SharedFault(f"this sweeper searches, but for nothing: give objective=NAME, of {_told(known)}.")
    if not names:
        return
    better = {name: _better(name, known) for name in names}
    if declared(cfg.evaluation).get("metrics"):
        for name in names:
            if better[name] is None:
                raise SharedFault(
                    f"objective={name}: a run with this evaluation measures no such thing; there are {_told(known)}."
                )
    if not directions:
        return
    if len(directions) != len(names):
        raise SharedFault(
            f"objective has {len(names)} names, and hydra.sweeper.direction {len(directions)}: give a direction for each."
        )
    for name, direction in zip(names, directions, strict=True):
        wanted = _WORDS.get(better[name] or "", direction)
        if direction != wanted:
            meant = ",".join(_WORDS.get(better[n] or "", d) for n, d in zip(names, directions, strict=True))
            raise SharedFault(
                f"objective={name} is better the {'larger' if better[name] == 'max' else 'smaller'} it is, and the sweeper would "
                f"{direction} it: give 'hydra.sweeper.direction={meant if len(names) == 1 else f'[{meant}]'}'."
            )


def objective(cfg: DictConfig, metrics: Mapping[str, Any]) -> float | list[float] | None:
    """The metric that `objective` names, the list of them where it names several, None where it names none.

    Raises UserError for one that the run has not measured, or that was not finite.
    """
    found = [_value(name, metrics) for name in _names(cfg)]
    return found if OmegaConf.is_list(cfg.objective) else next(iter(found), None)


def _value(name: str, metrics: Mapping[str, Any]) -> float:
    value = metrics.get(name)
    if not isinstance(value, int | float):
        have = ", ".join(sorted(key for key, own in metrics.items() if isinstance(own, int | float)))
        why = "was not finite in this run" if name in metrics and value is None else f"was not measured; there are {have}"
        raise UserError(f"objective={name} {why}.")
    if not math.isfinite(value):
        raise UserError(f"objective={name} was not finite in this run.")
    return float(value)


def _names(cfg: DictConfig) -> list[str]:
    """Raises SharedFault for a value that is no name and no list of names."""
    value = OmegaConf.to_container(cfg.objective) if OmegaConf.is_list(cfg.objective) else cfg.objective
    names = value if isinstance(value, list) else [] if value is None else [value]
    if value == [] or not all(isinstance(name, str) for name in names):
        raise SharedFault(f"objective must be the name of a metric, a list of names, or null; got {value!r}.")
    return list(map(str, names))


def _known(cfg: DictConfig) -> dict[str, str]:
    return {**(declared(cfg.evaluation).get("metrics") or {}), **OF_EVERY_RUN}


def _better(name: str, known: Mapping[str, str]) -> str | None:
    """`max` or `min`; None for a name that is not known."""
    return next((better for pattern, better in known.items() if fnmatchcase(name, pattern)), None)


def _told(known: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({_WORDS.get(better, better)})" for name, better in known.items())


def _directions(sweeper: Mapping[str, Any]) -> Sequence[str]:
    """The directions in which a sweeper searches; none for one that tries all combinations."""
    found: Any = sweeper.get("direction")
    listed = list(found) if OmegaConf.is_list(found) else [] if found is None else [found]
    return [getattr(direction, "name", str(direction)) for direction in listed]
