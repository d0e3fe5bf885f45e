"""From a study to its runs: every configuration composed and checked before the first run starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from mgvq.errors import UserError
from mgvq.runs.build import build, check
from mgvq.runs.identity import run_id
from mgvq.runs.places import conf_folder, register_resolvers
from mgvq.runs.store import RunFolder
from mgvq.studies.spec import Study


@dataclass(frozen=True)
class PlannedRun:
    """One cell of the study at one seed. Cells that are the same run share a folder."""

    arm: str
    point: dict[str, Any]
    seed: int
    overrides: tuple[str, ...]
    folder: RunFolder
    cfg: DictConfig

    @property
    def num_questions(self) -> int | None:
        """Of the evaluation, where it says so."""
        return self.cfg.evaluation.get("num_questions")


def expand(study: Study, *more: str) -> list[PlannedRun]:
    """All runs in the order of the file, with `more` overrides. Raises UserError, naming the arm, for what does not compose."""
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return [_plan(study, more, arm, point, seed) for point in study.points() for arm in study.arms for seed in study.seeds]


def distinct(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Each run once, at its first cell, in the order of the file."""
    first: dict[Path, PlannedRun] = {}
    for run in runs:
        first.setdefault(run.folder.path, run)
    return list(first.values())


def _plan(study: Study, more: Sequence[str], arm: str, point: dict[str, Any], seed: int) -> PlannedRun:
    values = [f"{key}={'null' if value is None else value}" for key, value in point.items()]
    overrides = [*study.common, *more, *values, *study.arms[arm], f"seed={seed}"]
    try:
        cfg = compose("config", overrides)
        if "group" in (cfg.tracker or ()):  # it shows runs by study, arm and seed
            overrides += [f"tracker.group={_quoted(study.name)}", f"tracker.name={_quoted(f'{arm}, seed {seed}')}"]
            cfg = compose("config", overrides)
        check(cfg)
        folder = RunFolder(Path(cfg.paths.results) / "runs" / run_id(cfg))
    except (HydraException, UserError) as error:
        raise UserError(f"study {study.name}, arm {arm} ({' '.join(overrides)}): {error}") from error
    return PlannedRun(arm, point, seed, tuple(overrides), folder, cfg)


def _quoted(text: str) -> str:
    """As Hydra's override grammar takes any text."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def build_components(runs: Sequence[PlannedRun]) -> None:
    """Build what every missing run is made of, once for each setting, so that a bad value shows before the first of them starts.

    Raises UserError, naming the arm.
    """
    from mgvq.runs.method import build_method  # here: torch takes seconds to import, and a finished study needs none of it

    tried: set[str] = set()
    for run in distinct(runs):
        if run.folder.is_done() or (settings := OmegaConf.to_yaml(run.cfg, resolve=True)) in tried:
            continue
        tried.add(settings)
        try:
            build_method(run.cfg)
            for group in ("model", "calibration", "evaluation", "tracker"):
                build(run.cfg, group)
        except UserError as error:
            raise UserError(f"arm {run.arm} ({' '.join(run.overrides)}): {error}") from error
