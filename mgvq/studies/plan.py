"""From a study to its runs: every configuration composed and checked before the first run starts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from mgvq.errors import UserError
from mgvq.runs.build import build, check
from mgvq.runs.compose import composer
from mgvq.runs.early import check_values
from mgvq.runs.identity import run_ids
from mgvq.runs.overrides import parsed, quoted
from mgvq.runs.store import RunFolder
from mgvq.studies.kinds import Kind, kind_of_config
from mgvq.studies.spec import Study


@dataclass(frozen=True)
class PlannedRun:
    """One cell of the study at one seed. Cells that are the same run share a folder."""

    arm: str
    point: dict[str, Any]
    seed: int
    overrides: tuple[str, ...]
    folder: RunFolder
    cell: DictConfig
    """The settings but for the seed: the runs of a cell share them, and nobody changes them."""

    @cached_property
    def cfg(self) -> DictConfig:
        """The settings of the run, made when they are asked for: a plan has thousands of runs."""
        own = self.cell.copy()
        own.seed = self.seed
        if "group" in (own.get("tracker") or ()):
            own.tracker.name = f"{self.arm}, seed {self.seed}"
        return own

    @property
    def num_samples(self) -> int | None:
        """How many samples the evaluation has, where a setting says so."""
        return self.cell.evaluation.get(self.kind.number) if self.kind and self.kind.number else None

    @property
    def kind(self) -> Kind | None:
        """The kind of the evaluation; None where it declares none, so that no table can be made of it."""
        return kind_of_config(self.cell.evaluation)


def expand(study: Study, last: Sequence[str] = ()) -> list[PlannedRun]:
    """All runs in the order of the file, with the overrides `last`, which win over the study's.

    Raises UserError for a frozen study, and, naming the arm, for what does not compose.
    """
    if study.frozen:
        raise UserError(
            f"study {study.name} is frozen at {study.frozen}: it is reported from its record and not run again; check out that "
            "commit to run it, or copy its file under another name and without `frozen`."
        )
    with composer() as compose:
        cells = [(arm, point) for point in study.points() for arm in study.arms_at(point)]
        runs = [run for arm, point in cells for run in _plan(study, compose, arm, point, last)]
    _check_primary(study, runs)
    return runs


def _check_primary(study: Study, runs: Sequence[PlannedRun]) -> None:
    """Images have no perplexity, text no accuracy, benchmarks no loss."""
    if study.primary is None:
        return
    metric = study.primary["metric"]
    for kind in filter(None, {run.kind for run in runs}):
        if metric not in kind.planned:
            can = " or ".join(kind.planned)
            raise UserError(f"study {study.name}: primary.metric={metric} is nothing that its evaluation measures; {can} is.")


def distinct(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Each run once, at its first cell, in the order of the file."""
    first: dict[Path, PlannedRun] = {}
    for run in runs:
        first.setdefault(run.folder.path, run)
    return list(first.values())


def _plan(
    study: Study, compose: Callable[..., DictConfig], arm: str, point: dict[str, Any], last: Sequence[str]
) -> list[PlannedRun]:
    """A cell at all its seeds: composed and checked once, which takes longer than all the rest."""
    overrides = [*study.overrides(arm, point), *last]
    planned = []
    try:
        for word in overrides:
            parsed(word)
        cfg = compose(*overrides)
        check(cfg)
        grouped = "group" in (cfg.tracker or ())  # it shows runs by study, arm and seed
        if grouped:
            cfg.tracker.group = study.name
        for path in ("paths.results", "model.path"):  # read once: their resolvers take longer than the rest of a run's name
            if (value := OmegaConf.select(cfg, path)) is not None:
                OmegaConf.update(cfg, path, value)
        seeds = study.seeds_at(point)
        runs = Path(cfg.paths.results) / "runs"
        for seed, name in zip(seeds, run_ids(cfg, seeds), strict=True):
            words = [*overrides, f"seed={seed}"]
            if grouped:
                words += [f"tracker.group={quoted(study.name)}", f"tracker.name={quoted(f'{arm}, seed {seed}')}"]
            planned.append(PlannedRun(arm, point, seed, tuple(words), RunFolder(runs / name), cfg))
    except (HydraException, UserError) as error:
        raise UserError(f"study {study.name}, arm {arm} ({' '.join(overrides)}): {error}") from error
    return planned


def build_components(runs: Sequence[PlannedRun]) -> None:
    """Build what every missing run is made of, once for each cell, so that a bad value, or a model or test data that is missing,
    shows before the first of them starts.

    Raises UserError, naming the arm.
    """
    missing: dict[int, PlannedRun] = {}
    for run in distinct(runs):
        if not run.folder.is_done():
            missing.setdefault(id(run.cell), run)
    for run in missing.values():
        with _naming_the_arm(run):
            check_values(run.cfg)
    if not missing:
        return
    from mgvq.protocols import ReadsData
    from mgvq.runs.method import build_method  # here: torch takes seconds to import, and a finished study needs none of it

    checked: list[ReadsData] = []
    for run in missing.values():
        with _naming_the_arm(run):
            build_method(run.cfg)
            build(run.cfg, "model").check()
            for group in ("calibration", "evaluation", "tracker"):
                part = build(run.cfg, group)
                if isinstance(part, ReadsData) and part not in checked:
                    part.check()
                    checked.append(part)


@contextmanager
def _naming_the_arm(run: PlannedRun) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"arm {run.arm} ({' '.join(run.overrides)}): {error}") from error
