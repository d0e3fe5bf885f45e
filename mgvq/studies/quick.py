"""A quick pass: a study with settings of one's own, to see whether it works and what it may find. It is not the study.

Its runs have names of their own wherever a setting counts, its table says what it is, and nothing is recorded.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import yaml
from hydra.core.override_parser.types import Glob

from mgvq.errors import UserError
from mgvq.runs.overrides import key_of, parsed
from mgvq.studies.spec import Study

SUFFIX = "_quick"


def quick_pass(study: Study, words: Sequence[str]) -> tuple[Study, list[str]]:
    """The study under a name of its own, and those of the words KEY=VALUE that are overrides of every run.

    A key of the grid, and `seed`, narrow the study to the values given (`model=a,b seed=0`) instead. Raises UserError for a word
    that cannot be read, for a setting in which arms differ, and for other settings with several values.
    """
    grid, seeds, overrides = dict(study.grid), study.seeds, []
    for word in words:
        override = parsed(word)
        key = override.key_or_group
        if key in study.grid:
            grid[key] = _values(word)
        elif key == "seed":
            seeds = _values(word)
        elif key == "dry":
            raise UserError(f"{word} runs nothing; mgvq-study --dry shows what would be run.")
        elif arms := [arm for arm, own in study.arms.items() if key in map(key_of, own)]:
            raise UserError(f"{word}: arms of study {study.name} differ in {key} ({', '.join(arms)}), and would be alike.")
        elif override.is_sweep_override():
            raise UserError(f"{word}: a quick pass has one value of {key} for all runs; give one.")
        else:
            overrides.append(word)
    dropped = {"trainings": None} if study.trainings in grid and len(grid[str(study.trainings)]) < 2 else {}
    only = {arm: _within(keys, grid) for arm, keys in study.only.items()}
    gone = [arm for arm, keys in only.items() if not all(keys.values())]
    arms = {arm: own for arm, own in study.arms.items() if arm not in gone}
    primary = study.primary if study.primary is None or study.primary.get("arm") in arms else None
    spread = study.spread if study.spread in arms else None
    only = {arm: keys for arm, keys in only.items() if arm in arms}
    if isinstance(seeds, dict):
        seeds = {value: own for value, own in seeds.items() if any(value in values for values in grid.values())}
    changed: dict[str, Any] = {"grid": grid, "seeds": seeds, "arms": arms, "only": only, "primary": primary, "spread": spread}
    return replace(study, name=f"{study.name}{SUFFIX}", **changed, **dropped), overrides


def told_quick(study: Study, words: Sequence[str]) -> str:
    """What stands above everything that a quick pass prints."""
    return (
        f"QUICK PASS of {study.name} with {' '.join(words)}: not the results of that study, and no part of its record; "
        "nothing is recorded."
    )


def _values(word: str) -> list[Any]:
    """The values of a word, as YAML has them."""
    override = parsed(word)
    if isinstance(override.value(), Glob):
        raise UserError(f"{word}: a quick pass takes no glob; give the values, as in {override.key_or_group}=a,b.")
    if override.is_sweep_override():
        return [yaml.safe_load(value) for value in override.sweep_string_iterator()]
    return [override.value()]


def _within(keys: dict[str, list[Any]], grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {key: [value for value in values if value in grid.get(key, ())] for key, values in keys.items()}
