"""lmms-eval in process: a wrapper around a loaded model, and one call that evaluates it on a task object.

lmms-eval's response cache is never used: it names models by text, not by their weights, and would hand the answers of one
quantised model to the next.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # a local task has nothing to ask the hub

import tenacity
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableTask, Task
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from PIL.Image import Image
from transformers import PreTrainedModel

from mgvq.model.encode import chat_prompt

_GENERATION_KEYS = ("max_new_tokens", "do_sample", "temperature", "top_p", "num_beams")


class InProcessModel(lmms):
    """Answers lmms-eval's generation requests with a model that is already in memory; errors raise, none becomes an answer."""

    is_simple = True

    def __init__(self, model: PreTrainedModel, processor: Any, batch_size: int) -> None:
        super().__init__()
        self.model, self.processor, self.batch_size = model, processor, batch_size

    def clean(self) -> None:
        """Keep the model: the base class strips every module off the wrapper after a run."""

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy unless the task asks otherwise; prompts of like length are batched together; the order is kept."""
        answers = [""] * len(requests)
        prompts = [chat_prompt(self.processor, r.args[0]) for r in requests]  # type: ignore[misc]
        order = sorted(range(len(requests)), key=lambda i: (len(prompts[i]), i))
        for at in range(0, len(order), self.batch_size):
            part = order[at : at + self.batch_size]
            images = [[_image(self.task_dict, requests[i])] for i in part]
            inputs = self.processor(images=images, text=[prompts[i] for i in part], return_tensors="pt", padding=True)
            settings: dict[str, Any] = requests[part[0]].args[1]  # type: ignore[misc]
            with torch.inference_mode():
                tokens = self.model.generate(  # type: ignore[operator]
                    **inputs.to(self.model.device), **{k: settings[k] for k in _GENERATION_KEYS if k in settings}
                )
            new = tokens[:, inputs["input_ids"].shape[1] :]
            texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
            for i, text in zip(part, texts, strict=True):
                for stop in settings.get("until", []):
                    text = text.split(stop)[0]
                answers[i] = text.strip()
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise TypeError("multiple-choice tasks are not supported: lmms-eval 0.7.3 cannot score them; use a generating task")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise TypeError("multi-round tasks are not supported: a question here has one answer")


def _image(task_dict: dict[str, Any], request: Instance) -> Image:
    _, _, to_visual, doc_id, task, split = request.args  # type: ignore[misc]
    (image,) = to_visual(task_dict[task][split][doc_id])
    return image


def evaluate(
    model: PreTrainedModel, processor: Any, task: Task, label: str, batch_size: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """lmms-eval's results and its per-sample rows for one task object; `label` (the weights' digest) is recorded with them."""
    _raise_at_once(ConfigurableTask)
    name = task.config.task
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as scratch:
        output = simple_evaluate(
            model=InProcessModel(model, processor, batch_size),
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
    return results, output["samples"][name]


def _raise_at_once(task_class: type) -> None:
    """lmms-eval retries a failing `process_results` and `download` for eight seconds and hides the reason."""
    for name in ("process_results", "download"):
        retry: Callable[..., Any] = getattr(task_class, name).retry
        retry.stop = tenacity.stop_after_attempt(1)  # type: ignore[attr-defined]
        retry.reraise = True  # type: ignore[attr-defined]
