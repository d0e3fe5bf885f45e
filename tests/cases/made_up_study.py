"""A study of made-up runs, small enough to damage in every way: two points, three arms, three seeds, forty questions."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from conftest import declare_done, write_finished_run
from omegaconf import OmegaConf

from mgvq.data.tiny_vqa.questions import HEADLINE
from mgvq.runs.places import conf_folder
from mgvq.runs.store import RunFolder
from mgvq.studies.plan import PlannedRun
from mgvq.studies.spec import Study

SKILL = {"full": 0.95, "base": 0.5, "better": 0.8}
STUDY = Study(
    name="made_up",
    question="which is better?",
    arms={arm: [f"arm={arm}"] for arm in SKILL},
    seeds=[0, 1, 2],
    grid={"model": ["one", "two"]},
    baseline="base",
    primary={"arm": "better", "metric": "loss"},
)
NUM_IMAGES = 10
EVALUATION = OmegaConf.load(conf_folder() / "evaluation" / "tiny_vqa.yaml")
CFG = OmegaConf.create({"evaluation": {**EVALUATION, "num_questions": 4 * NUM_IMAGES}})


def write_run(folder: Path, arm: str, seed: int, skill: float) -> None:
    """A finished run in all its files."""
    rng = np.random.default_rng([seed, *map(ord, arm)])
    samples = pd.DataFrame({"type": list(HEADLINE)[:4] * NUM_IMAGES, "num_tokens": [2, 2, 3, 4] * NUM_IMAGES})
    samples["sample_id"] = [f"test-0-{i // 4}-{i % 4}" for i in samples.index]
    samples["sample_hash"], samples["task"] = samples.sample_id, "tiny_vqa"
    samples["score"] = (rng.random(len(samples)) < skill).astype(float)
    samples["loss"] = samples.num_tokens * (1 - skill) * rng.random(len(samples))
    samples["kl"] = samples.loss / 2
    tokens = samples.num_tokens.sum()
    by_type = samples.groupby("type").score.mean()
    metrics = {
        "tiny_vqa/accuracy": by_type.mean(),
        **{f"tiny_vqa/accuracy/{name}": value for name, value in by_type.items()},
        "loss/answer": samples.loss.sum() / tokens,
        "kl/full_precision": samples.kl.sum() / tokens,
        "rate": "full_precision" if arm == "full" else "2x16",
    }
    write_finished_run(folder, samples, metrics, '{"model": {"name": "tiny"}}')


def plan(results: Path, study: Study = STUDY) -> list[PlannedRun]:
    """What `expand` gives, with finished runs; `full` is one run for all seeds."""
    skill = dict(zip(study.arms, SKILL.values(), strict=False))
    runs = []
    for point in study.points():
        for number, arm in enumerate(study.arms):
            for seed in study.seeds_at(point):
                folder = results / "runs" / f"{point['model']}-{number}-{seed * (number > 0)}"
                if not folder.exists():
                    write_run(folder, "full" if number == 0 else arm, seed, skill[arm])
                overrides = (f"model={point['model']}", f"arm={number}", f"seed={seed}")
                runs.append(PlannedRun(arm, point, seed, overrides, RunFolder(folder), CFG))
    return runs


def with_names(*names: str) -> Study:
    """The same study with other names of its arms."""
    arms = {name: [f"arm={number}"] for number, name in enumerate(names)}
    return replace(STUDY, arms=arms, baseline=names[1], primary={"arm": names[2], "metric": "loss"})


def rewrite_metrics(folder: Path, changes: Mapping[str, Any]) -> None:
    """Change metrics of a run as if it had written others."""
    file = folder / "metrics.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    declare_done(folder)


def rewrite_samples(folder: Path, column: str, value: float) -> None:
    """Change the value of one question as if the run had written another."""
    file = folder / "samples.parquet"
    samples = pd.read_parquet(file)
    samples.loc[3, column] = value
    samples.to_parquet(file)
    declare_done(folder)


def copied(results: Path, to: Path) -> Path:
    """The runs in another place, to be damaged there."""
    shutil.copytree(results / "runs", to / "runs")
    return to
