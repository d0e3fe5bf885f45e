"""The benchmarks of the papers through lmms-eval, by its own task names, with what chance and unreadable answers add to them."""

import hashlib
import io
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
from PIL import Image
from transformers import PreTrainedModel

from mgvq.checks import short_words, whole_number
from mgvq.data.benchmarks import BENCHMARKS
from mgvq.errors import UserError
from mgvq.evaluation.means import missing_flags, num_broken
from mgvq.evaluation.suite_metrics import averages, metrics
from mgvq.model.reference import Reference
from mgvq.types import EvalResult

if TYPE_CHECKING:
    from mgvq.evaluation.tasks.benchmark import BenchmarkTask
    from mgvq.model.generate import Reply

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Public benchmarks, asked and scored as lmms-eval does."""

    tasks: list[str]  # lmms-eval's names
    max_new_tokens: dict[str, int]  # by task; one number for every model
    limit: int | None  # questions of each task; None: all
    seed: int  # draws the questions where there is a limit
    batch_size: int  # images that are looked at together
    data: str | None  # a folder with copies of the hub's datasets, ORGANISATION/NAME below it; None: what is cached of them
    shows_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        known = ", ".join(BENCHMARKS)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"evaluation.tasks must name one or more different tasks of {known}; got {self.tasks!r}")
        if unknown := sorted({*self.tasks, *self.max_new_tokens} - set(BENCHMARKS)):
            raise UserError(f"evaluation.tasks, evaluation.max_new_tokens: no {', '.join(unknown)} here; there are {known}.")
        for task in self.tasks:
            whole_number(f"evaluation.max_new_tokens.{task}", self.max_new_tokens.get(task), least=1)
        if self.limit is not None:
            whole_number("evaluation.limit", self.limit, least=1, why="null asks all questions.")
        whole_number("evaluation.seed", self.seed)
        if self.seed and self.limit is None:
            raise UserError(f"evaluation.seed={self.seed} draws the questions of evaluation.limit; without one it has no effect.")
        whole_number("evaluation.batch_size", self.batch_size, least=1)

    def check(self) -> None:
        """Open every dataset, and read each question as it will be asked and scored, its image as far as its size.

        Raises UserError for all datasets that fail. A question whose image cannot be read costs no more than itself, and is told.
        """
        problems = {}
        for name in self.tasks:
            try:
                task = self._load(name)
                _check_rows(name, task)
                if (first := task.first_readable()) is not None:
                    task.doc_to_visual(first)
            except Exception as error:  # whatever the libraries raise on a folder that is no such dataset
                problems[name] = f"\n  {name} reads {_place(name)}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if problems:
            where = f"{self.data}/ORGANISATION/NAME (evaluation.data)" if self.data else "the cache of the datasets library"
            example = BENCHMARKS[next(iter(problems))].dataset
            raise UserError(
                f"evaluation=suite: {len(problems)} of {len(self.tasks)} tasks find no dataset that they can read in {where}:"
                f"{''.join(problems.values())}\n"
                f"Where there is a network, `hf download {example} --repo-type dataset --local-dir DIR/{example}` fetches one, "
                "and likewise the others; then set evaluation.data=DIR. Or let this command itself fill the cache: "
                "HF_DATASETS_OFFLINE=0 in front of it. Or leave tasks out: evaluation.tasks=[...]. The cache, which HF_HOME "
                "moves, must be writable."
            )

    def __call__(self, model: PreTrainedModel, reference: Reference | None, processor: Any, label: str) -> EvalResult:
        """One row a question, with `parsed`, `chance` and `corrected` beside `score`; `metrics` says what is made of them.

        The reference is not asked: these questions have answers of their own.
        """
        from mgvq.evaluation.harness import evaluate  # here: lmms-eval takes seconds to import

        frames: list[pd.DataFrame] = []
        found: dict[str, float] = {}
        flags: tuple[str, ...] = ()
        for name in self.tasks:
            task = self._load(name)
            results, rows = evaluate(model, processor, task, label, self.batch_size)
            answers = {row["doc_id"]: row["filtered_resps"][0] for row in rows}
            samples = pd.DataFrame(_judged(name, task, answers, {row["doc_id"]: row["reply"] for row in rows}))
            broken, unasked = num_broken(samples.score), int((~samples.asked).sum())
            raw = math.nan if broken else results[task.benchmark.metric] / task.benchmark.full
            measured = {f"{name}/raw": raw, **metrics(name, samples)}
            flags += missing_flags(measured, lambda _, broken=broken: broken)
            flags += (f"unanswered:{name}:{unasked}",) if unasked else ()
            found |= measured
            frames.append(samples.drop(columns="asked"))
        everything = pd.concat(frames, ignore_index=True)
        over_tasks = averages(everything)
        flags += missing_flags(over_tasks, lambda _: num_broken(everything.score))
        return EvalResult({**over_tasks, **found}, everything, flags)

    def _load(self, name: str) -> "BenchmarkTask":
        from mgvq.evaluation.harness import raise_at_once
        from mgvq.evaluation.tasks.benchmark import BenchmarkTask

        raise_at_once()
        data = Path(self.data).absolute() if self.data else None
        return BenchmarkTask(name, self.max_new_tokens[name], data, self.limit, self.seed)


def _check_rows(name: str, task: "BenchmarkTask") -> None:
    """Raises ValueError, with its row, for a question that would end the evaluation: one without a text, or without an image."""
    unreadable: dict[int, str] = {}
    rows = zip(task.rows(), _rows(name, task), strict=True)
    for number in task.numbers:
        try:
            (doc, raw), (row, _, _) = next(rows)
            if not (row["question"] or "").strip() or not task.doc_to_text(doc):
                raise ValueError("its question is empty")
            images = list(_images(raw))
            if not images:
                raise ValueError("it has no image")
        except Exception as error:
            raise ValueError(f"row {number}: {short_words(error)}") from error
        for image in images:
            try:
                Image.open(io.BytesIO(image)).close()  # its head, which has the size
            except Exception as error:  # whatever Pillow raises
                unreadable[number] = short_words(error)
    if unreadable:
        first = next(iter(unreadable))
        log.warning(
            "%s: %d of %d questions will count as not answered, since their images cannot be read; the first is row %d: %s",
            name, len(unreadable), len(task.numbers), first, unreadable[first],
        )  # fmt: skip


def _place(name: str) -> str:
    benchmark = BENCHMARKS[name]
    part = f" ({benchmark.part})" if benchmark.part else ""
    return f"{benchmark.dataset}{part}, split {benchmark.split}"


def _rows(name: str, task: "BenchmarkTask") -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, str]]]:
    """Three things of every question: its row as far as no answer is needed, its document without images, its options.

    Rows that share an image have sample ids that differ in their last part alone; the hash is of all that the dataset holds of
    a question.
    """
    from mgvq.evaluation.tasks.judges import JUDGES

    judge = JUDGES[name]
    for number, (doc, raw) in zip(task.numbers, task.rows(), strict=True):
        options = judge.options(doc)
        row = {
            "task": name,
            "sample_id": f"{name}-{_digest(list(_images(raw)))}-{number}",
            "sample_hash": _digest(raw),
            "type": judge.type(doc),
            "question": doc["question"],
            "answer": judge.answer(doc),
            "chance": 1 / len(options) if options else 0.0,
        }
        yield row, doc, dict(options)


def _judged(name: str, task: "BenchmarkTask", answers: dict[int, str], replies: dict[int, "Reply"]) -> Iterator[dict[str, Any]]:
    """The rows with the answers, which come by document number.

    An answer that was chosen from numbers that are none (NaN or infinite logits) has no score. A question that could not be
    asked is one without an answer.
    """
    from mgvq.evaluation.tasks.judges import JUDGES

    judge = JUDGES[name]
    for doc_id, (row, doc, options) in enumerate(_rows(name, task)):
        text, reply = answers[doc_id], replies[doc_id]
        if options:
            letter = judge.chosen(doc, text)
            parsed, score = letter is not None, float(letter == row["answer"])
            wrong = parsed and not score
            corrected = score - wrong / max(1, len(options) - 1)
        else:
            parsed, score = bool(text.strip()), float(judge.scores(doc, text))
            corrected = score
        if reply.refused is not None:
            parsed, score, corrected = False, 0.0, 0.0
        if not reply.finite:
            parsed, score, corrected = False, math.nan, math.nan
        asked = {"asked": reply.refused is None}
        yield {**row, "prediction": text, "parsed": parsed, "score": score, "corrected": corrected, **asked}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=lambda raw: hashlib.sha256(raw).hexdigest())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _images(value: Any) -> Iterator[bytes]:
    """The bytes of the images in a row as it is stored."""
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _images(part)
