"""lmms-eval in process: a wrapper around a loaded model, and one call that evaluates it on a task object.

lmms-eval's response cache is never used: it names models by text, not by their weights, and would hand the answers of one
quantised model to the next.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # a local task has nothing to ask the hub

import tenacity
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableTask, Task
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from transformers import PreTrainedModel

from mgvq.checks import short_words
from mgvq.model.generate import Reply, generate
from mgvq.model.image import Question, Unaskable

_GENERATION_KEYS = ("max_new_tokens", "do_sample", "temperature", "top_p", "num_beams")


class InProcessModel(lmms):
    """Answers lmms-eval's generation requests with a model that is already in memory; errors raise, none becomes an answer."""

    is_simple = True

    def __init__(self, model: PreTrainedModel, processor: Any, batch_size: int) -> None:
        super().__init__()
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.replies: dict[int, Reply] = {}  # by document number

    def clean(self) -> None:
        """Keep the model: the base class strips every module off the wrapper after a run."""

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer greedily unless the task asks otherwise; requests of several tasks come together, each with its settings."""
        answers = [""] * len(requests)
        by_task: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_task.setdefault(request.args[4], []).append(number)  # type: ignore[misc]
        for numbers in by_task.values():
            for number, text in zip(numbers, self.answers([requests[i] for i in numbers]), strict=True):
                answers[number] = text
        return answers

    def answers(self, requests: Sequence[Instance]) -> list[str]:
        """The answers to requests of one task."""
        settings: dict[str, Any] = requests[0].args[1]  # type: ignore[misc]
        questions = _Questions(self.task_dict, requests)
        known = {k: settings[k] for k in _GENERATION_KEYS if k in settings}
        replies = generate(self.model, self.processor, questions, self.batch_size, known)
        self.replies |= {request.args[3]: reply for request, reply in zip(requests, replies, strict=True)}  # type: ignore[misc]
        answers = [reply.text for reply in replies]
        for stop in settings.get("until", []):
            answers = [text.split(stop)[0] for text in answers]
        return [text.strip() for text in answers]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise TypeError("multiple-choice tasks are not supported: lmms-eval 0.7.3 cannot score them; use a generating task")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise TypeError("multi-round tasks are not supported: a question here has one answer")


class _Questions(Sequence[Question]):
    """Images are decoded when a question is looked at: those of a whole benchmark would not fit into memory."""

    def __init__(self, task_dict: dict[str, Any], requests: Sequence[Instance]) -> None:
        self._task_dict, self._requests = task_dict, requests

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, index: int) -> Question:  # type: ignore[override]  # no slices
        text, _, to_visual, doc_id, task, split = self._requests[index].args  # type: ignore[misc]
        try:
            images = to_visual(self._task_dict[task][split][doc_id])
        except Exception as error:  # whatever Pillow raises on a damaged image, or one that is too large
            raise Unaskable(f"question {doc_id} of {task}: its image cannot be read ({short_words(error)})") from error
        if not images:
            raise TypeError(f"question {doc_id} of {task} has no image: such questions are not supported")
        return images[0] if len(images) == 1 else tuple(images), text


def evaluate(
    model: PreTrainedModel, processor: Any, task: Task, label: str, batch_size: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """lmms-eval's results and its per-sample rows for one task object; `label` (the weights' digest) is recorded with them.

    Each row has the model's `reply` too, as `generate` gave it: whether the question could be asked, and answered in finite
    numbers.
    """
    raise_at_once()
    name = task.config.task
    answering = InProcessModel(model, processor, batch_size)
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as scratch:
        output = simple_evaluate(
            model=answering,
            model_args=f"weights={label}",
            tasks=[task],
            task_manager=TaskManager(include_defaults=False, verbosity="ERROR"),
            bootstrap_iters=0,
            process_docs_parallel=1,
            # Keeps media out of the sample rows and stray files out of the working directory.
            cli_args=argparse.Namespace(output_path=scratch, process_with_media=False),
            verbosity="ERROR",
        )
    assert output is not None
    results = {k.split(",")[0]: v for k, v in output["results"][name].items() if isinstance(v, float)}
    rows = [{**row, "reply": answering.replies[row["doc_id"]]} for row in output["samples"][name]]
    return results, rows


def raise_at_once() -> None:
    """lmms-eval retries a failing `process_results` and `download` for eight seconds and hides the reason: no more."""
    for name in ("process_results", "download"):
        retry: Callable[..., Any] = getattr(ConfigurableTask, name).retry
        retry.stop = tenacity.stop_after_attempt(1)  # type: ignore[attr-defined]
        retry.reraise = True  # type: ignore[attr-defined]
