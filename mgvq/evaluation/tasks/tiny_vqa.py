"""The tiny VQA as lmms-eval asks for it; `tiny_vqa.yaml` names the functions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.utils import load_yaml_config
from PIL import Image

from mgvq.evaluation.documents import headline_accuracy, is_right

__all__ = ["TinyVQATask", "doc_to_visual", "headline_accuracy", "process_results"]


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
    """The one image of a question."""
    return [doc["image"].convert("RGB")]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """One answer's contribution to the headline accuracy."""
    return {"accuracy": {"type": doc["type"], "score": float(is_right(doc, results[0]))}}
