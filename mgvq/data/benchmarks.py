"""The public benchmarks that `evaluation=suite` asks: where lmms-eval keeps the task, and which dataset of the hub it reads."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A task of lmms-eval."""

    recipe: str  # its yaml below lmms-eval's `tasks/`
    dataset: str  # what is asked, by its name on the hub
    part: str | None = None  # of the dataset, where it has several
    split: str
    metric: str  # the one that papers report
    full: float = 1.0  # what the metric gives for right answers alone
    only: tuple[str, str] | None = None  # a column, and the value that a row must have in it to be asked
    rotated: bool = False  # rows whose `index` differs by millions are one question with its options in another order


BENCHMARKS = {
    "mmmu_val": Benchmark(recipe="mmmu/mmmu_val.yaml", dataset="lmms-lab-encoder/MMMU", split="validation", metric="mmmu_acc"),
    "seedbench": Benchmark(
        recipe="seedbench/seedbench.yaml",
        dataset="lmms-lab-encoder/SEED-Bench",
        split="test",
        metric="seed_image",
        only=("data_type", "image"),  # the rest are videos
    ),
    "ocrbench": Benchmark(recipe="ocrbench/ocrbench.yaml", dataset="echo840/OCRBench", split="test", metric="ocrbench_accuracy"),
    "vizwiz_vqa_val": Benchmark(
        recipe="vizwiz_vqa/vizwiz_vqa_val.yaml", dataset="lmms-lab-encoder/VizWiz-VQA", split="val", metric="exact_match"
    ),
    "scienceqa_img": Benchmark(
        recipe="scienceqa/scienceqa_img.yaml",
        dataset="lmms-lab-encoder/ScienceQA",
        part="ScienceQA-IMG",
        split="test",
        metric="exact_match",
    ),
    "textvqa_val": Benchmark(
        recipe="textvqa/textvqa_val.yaml", dataset="lmms-lab-encoder/textvqa", split="validation", metric="exact_match"
    ),
    "mmbench_en_dev_static": Benchmark(
        recipe="mmbench/mmbench_en_dev_static.yaml",
        dataset="lmms-lab-encoder/MMBench",
        part="en",
        split="dev",
        metric="gpt_eval_score",  # so called, though the static variant asks no GPT
        full=100.0,
        rotated=True,
    ),
    "mmstar": Benchmark(recipe="mmstar/mmstar.yaml", dataset="Lin-Chen/MMStar", split="val", metric="average"),
}


def tokens_that_count(max_new_tokens: Mapping[str, int], fields: Mapping[str, Any]) -> dict[str, int | None]:
    """The limits of the tasks that are asked: those of others leave a run as it is.

    A rule of identity: conf/evaluation/suite.yaml names it under `_declares_`, and what it returns is hashed into a run's name.
    """
    return {task: max_new_tokens.get(task) for task in fields["tasks"]}


def datasets_that_count(folder: str | None, fields: Mapping[str, Any]) -> dict[str, str] | None:
    """A digest of the dataset in `folder` for each task that is asked; None for datasets from the library's cache.

    A rule of identity, as `tokens_that_count` is.
    """
    if folder is None:
        return None
    return {task: _listing(Path(folder) / BENCHMARKS[task].dataset) for task in fields["tasks"] if task in BENCHMARKS}


def _listing(folder: Path) -> str:
    """The digest of names and sizes of a dataset's files, which are too large to read; a missing folder is reported later."""
    files = sorted((f.relative_to(folder).as_posix(), f.stat().st_size) for f in folder.rglob("*.parquet"))
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
