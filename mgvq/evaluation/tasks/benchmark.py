"""A public benchmark as lmms-eval asks and scores it, over the questions that were chosen, with the settings of this run."""

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lmms_eval.tasks
import torch
from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.utils import load_yaml_config

from mgvq.data.benchmarks import BENCHMARKS, Benchmark
from mgvq.data.cached import cache_of
from mgvq.rng import generator

_ROTATION = 1_000_000  # MMBench counts the rotations of a question's options in millions of its index


class BenchmarkTask(ConfigurableTask):
    """lmms-eval's task `name`: its prompts, parsers and scores, with one `max_new_tokens` for every model, and greedy.

    The dataset is `data/ORGANISATION/NAME` where `data` is given, else the hub's, or what is cached of it. `limit` questions are
    drawn by `seed`, None: all. `numbers` are the places in the dataset of the rows that are asked.
    """

    def __init__(self, name: str, max_new_tokens: int, data: Path | None, limit: int | None, seed: int) -> None:
        self.benchmark = BENCHMARKS[name]
        self._limit, self._draw = limit, generator(seed, "evaluation", name)
        config = load_yaml_config(str(Path(lmms_eval.tasks.__file__).parent / self.benchmark.recipe), mode="full")
        stops = config.get("generation_kwargs", {}).get("until")
        config |= {
            "dataset_path": str(data / self.benchmark.dataset) if data else self.benchmark.dataset,
            # lmms-eval's yamls want a login (`token: True`) for datasets that are public.
            "dataset_kwargs": {"cache_dir": cache_of(data / self.benchmark.dataset)} if data else None,
            "generation_kwargs": {"max_new_tokens": max_new_tokens, "do_sample": False, **({"until": stops} if stops else {})},
            "metric_list": [_metric(name, m) for m in config["metric_list"] if m["metric"] == self.benchmark.metric],
        }
        super().__init__(config=config)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Called by the base class. Leaves the rows that are asked, in their order; a question's rotations stay together."""
        super().download(dataset_kwargs)
        split = self.benchmark.split
        whole: tuple[Any, Any] = self.dataset, self.dataset_no_image
        self.numbers = _chosen(whole[0][split], self.benchmark, self._limit, self._draw)
        self._questions, self._documents = (part[split].select(self.numbers) for part in whole)
        self.dataset, self.dataset_no_image = DatasetDict({split: self._questions}), DatasetDict({split: self._documents})

    def test_docs(self) -> Dataset:
        """Called by the base class, which looks at the first: without images, of which a damaged one would be raised."""
        return self._documents

    def first_readable(self) -> dict[str, Any] | None:
        """The first question whose images can be decoded, with them; None where those of no question can be."""
        for at in range(len(self._questions)):
            with contextlib.suppress(Exception):  # whatever Pillow raises
                return self._questions[at]
        return None

    def rows(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """The document of every question without its images, and what the dataset stores of it, images as files' bytes."""
        stored: Any = self._questions.with_format("arrow")
        for at, doc in enumerate(self._documents):
            (raw,) = stored[at : at + 1].to_pylist()
            yield dict(doc), raw


def _metric(name: str, listed: dict[str, Any]) -> dict[str, Any]:
    """OCRBench is averaged here: lmms-eval divides by 1000 whatever was asked, and goes on counting from call to call."""
    return {**listed, "aggregation": _mean_score} if name == "ocrbench" else listed


def _mean_score(items: Sequence[dict[str, Any]]) -> float:
    return float(statistics.mean(item["score"] for item in items))


def _chosen(rows: Dataset, benchmark: Benchmark, limit: int | None, draw: torch.Generator) -> list[int]:
    kept = list(range(len(rows)))
    if benchmark.only:
        column, value = benchmark.only
        kept = [i for i, found in enumerate(rows[column]) if found == value]
    if limit is None:
        return kept
    questions = [index % _ROTATION for index in rows["index"]] if benchmark.rotated else list(range(len(rows)))
    asked = list(dict.fromkeys(questions[i] for i in kept))
    drawn = {asked[i] for i in torch.randperm(len(asked), generator=draw)[:limit].tolist()}
    return [i for i in kept if questions[i] in drawn]
