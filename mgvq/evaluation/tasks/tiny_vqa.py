"""The documents of the tiny VQA and their scoring, as lmms-eval asks for them."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.utils import load_yaml_config
from PIL import Image

from mgvq.data.tiny_vqa.dataset import Picture, draw_test
from mgvq.data.tiny_vqa.questions import HEADLINE

NAME = "tiny_vqa"


def documents(seed: int, num_questions: int) -> list[dict[str, Any]]:
    """One document a question: `sample_id, sample_hash, type, question, answer, image`."""
    return [doc for picture in draw_test("test", seed, num_questions) for doc in _documents(picture, seed)]


def _documents(picture: Picture, seed: int) -> list[dict[str, Any]]:
    image = Image.fromarray(picture.pixels)
    pixels = picture.pixels.tobytes()
    return [
        {
            "sample_id": f"test-{seed}-{picture.index}-{number}",
            "sample_hash": hashlib.sha256(pixels + f"{q.text}\n{q.answer}".encode()).hexdigest()[:16],
            "type": q.type,
            "question": q.text,
            "answer": q.answer,
            "image": image,
        }
        for number, q in enumerate(picture.questions)
    ]


class TinyVQATask(ConfigurableTask):
    """`tiny_vqa.yaml` over documents that are already drawn."""

    def __init__(self, docs: Sequence[dict[str, Any]]) -> None:
        self._docs = docs
        config = load_yaml_config(str(Path(__file__).with_suffix(".yaml")), mode="full")
        super().__init__(config=config)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Called by the base class in place of a download."""
        columns = {key: [d[key] for d in self._docs] for key in self._docs[0] if key != "image"}
        self.dataset_no_image = DatasetDict({"test": Dataset.from_dict(columns)})
        self.dataset = DatasetDict({"test": Dataset.from_dict({**columns, "image": [d["image"] for d in self._docs]})})


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The one picture of a question."""
    return [doc["image"].convert("RGB")]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Exact match of the whole answer."""
    return {"accuracy": {"type": doc["type"], "score": float(results[0].split() == doc["answer"].split())}}


def headline_accuracy(items: Sequence[dict[str, Any]]) -> float:
    """Weighted mean over the headline types of the share of right answers; types that were not asked are left out."""
    scores: dict[str, list[float]] = defaultdict(list)
    for item in items:
        scores[item["type"]].append(item["score"])
    asked = {kind: weight for kind, weight in HEADLINE.items() if kind in scores}
    total = sum(asked.values())
    return sum(w * sum(scores[k]) / len(scores[k]) for k, w in asked.items()) / total if total else float("nan")
