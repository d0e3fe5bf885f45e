"""Configurations as the commands compose them, and the names that runs have by them."""

from pathlib import Path

from omegaconf import DictConfig

from mgvq.runs.build import STAGES, check
from mgvq.runs.compose import composer
from mgvq.runs.identity import run_id
from mgvq.runs.places import conf_folder

CONF = conf_folder()
ROOT = Path(__file__).parents[1]
GROUPS = ("model", "calibration", *STAGES, "evaluation", "tracker")
VARIANTS = [(g, f.stem) for g in GROUPS for f in sorted((CONF / g).glob("*.yaml"))]
METHODS = sorted(f.stem for f in (CONF / "method").glob("*.yaml"))


def composed(*overrides: str) -> DictConfig:
    with composer() as compose:
        return compose(*overrides)


def identity(*overrides: str) -> str:
    cfg = composed(*overrides)
    check(cfg)
    return run_id(cfg)
