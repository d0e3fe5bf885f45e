"""The benchmarks of the papers through lmms-eval, by its own task names, with what chance and unreadable answers add to them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from mgvq.data.benchmarks import BENCHMARKS
from mgvq.errors import UserError
from mgvq.types import EvalResult

if TYPE_CHECKING:
    from mgvq.evaluation.tasks.benchmark import BenchmarkTask


@dataclass(frozen=True, kw_only=True)
class Suite:
    """`tasks` by lmms-eval's names; `max_new_tokens` by task, one number for every model; `limit` questions of each, by `seed`.

    `data`: a folder with copies of the hub's datasets, `ORGANISATION/NAME` below it; None: what the datasets library has cached.
    """

    tasks: list[str]
    max_new_tokens: dict[str, int]
    limit: int | None
    seed: int
    batch_size: int
    data: str | None
    shows_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        known = ", ".join(BENCHMARKS)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"evaluation.tasks must name one or more different tasks of {known}; got {self.tasks!r}")
        if unknown := sorted({*self.tasks, *self.max_new_tokens} - set(BENCHMARKS)):
            raise UserError(f"evaluation.tasks, evaluation.max_new_tokens: no {', '.join(unknown)} here; there are {known}.")
        for task in self.tasks:
            if not _is_count(self.max_new_tokens.get(task)):
                raise UserError(
                    f"evaluation.max_new_tokens.{task} must be a whole number >= 1, got {self.max_new_tokens.get(task)!r}"
                )
        if not (self.limit is None or _is_count(self.limit)):
            raise UserError(f"evaluation.limit must be a whole number >= 1, or null for all questions; got {self.limit!r}")
        if not (isinstance(self.seed, int) and self.seed >= 0):
            raise UserError(f"evaluation.seed must be a whole number >= 0, got {self.seed!r}")
        if self.seed and self.limit is None:
            raise UserError(f"evaluation.seed={self.seed} draws the questions of evaluation.limit; without one it has no effect.")
        if not _is_count(self.batch_size):
            raise UserError(f"evaluation.batch_size must be a whole number >= 1, got {self.batch_size!r}")

    def check(self) -> None:
        """Open every dataset, and read its first row as it will be asked and scored. Raises UserError for all that fail."""
        problems = {}
        for name in self.tasks:
            try:
                task = self._load(name)
                next(_rows(name, task))
                task.doc_to_visual(task.task_docs[0])
            except (OSError, LookupError, ValueError, TypeError, AttributeError) as error:
                problems[name] = f"\n  {name} reads {_place(name)}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if problems:
            where = f"{self.data}/ORGANISATION/NAME (evaluation.data)" if self.data else "the cache of the datasets library"
            example = BENCHMARKS[next(iter(problems))].dataset
            raise UserError(
                f"evaluation=suite: {len(problems)} of {len(self.tasks)} tasks find no dataset that they can read in {where}:"
                f"{''.join(problems.values())}\n"
                f"Where there is a network, `hf download {example} --repo-type dataset --local-dir DIR/{example}` fetches one, "
                "and likewise the others; then set evaluation.data=DIR. Or let this command itself fill the cache: "
                "HF_DATASETS_OFFLINE=0 in front of it. Or leave tasks out: evaluation.tasks=[...]."
            )

    def __call__(self, model: PreTrainedModel, reference: PreTrainedModel | None, processor: Any, label: str) -> EvalResult:
        """One row a question, with `parsed`, `chance` and `corrected` beside `score`; `metrics` says what is made of them.

        The reference is not asked: these questions have answers of their own.
        """
        from mgvq.evaluation.harness import evaluate  # here: lmms-eval takes seconds to import

        frames, found = [], {}
        for name in self.tasks:
            task = self._load(name)
            results, rows = evaluate(model, processor, task, label, self.batch_size)
            answers = {row["doc_id"]: row["filtered_resps"][0] for row in rows}
            samples = pd.DataFrame(_judged(name, task, answers))
            found |= {f"{name}/raw": results[task.benchmark.metric] / task.benchmark.full, **metrics(name, samples)}
            frames.append(samples)
        everything = pd.concat(frames, ignore_index=True)
        return EvalResult({**averages(everything), **found}, everything)

    def _load(self, name: str) -> "BenchmarkTask":
        from mgvq.evaluation.harness import raise_at_once
        from mgvq.evaluation.tasks.benchmark import BenchmarkTask

        raise_at_once()
        data = Path(self.data).absolute() if self.data else None
        return BenchmarkTask(name, self.max_new_tokens[name], data, self.limit, self.seed)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _place(name: str) -> str:
    benchmark = BENCHMARKS[name]
    part = f" ({benchmark.part})" if benchmark.part else ""
    return f"{benchmark.dataset}{part}, split {benchmark.split}"


def _rows(name: str, task: "BenchmarkTask") -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, str]]]:
    """Of every question: its row as far as no answer is needed, its document without pictures, its options.

    Rows that share a picture have sample ids that differ in their last part alone; the hash is of all that the dataset holds of
    a question.
    """
    from mgvq.evaluation.tasks.judges import JUDGES

    judge = JUDGES[name]
    for number, (doc, raw) in zip(task.numbers, task.rows(), strict=True):
        options = judge.options(doc)
        row = {
            "task": name,
            "sample_id": f"{name}-{_digest(list(_pictures(raw)))}-{number}",
            "sample_hash": _digest(raw),
            "type": judge.type(doc),
            "question": doc["question"],
            "answer": judge.answer(doc),
            "chance": 1 / len(options) if options else 0.0,
        }
        yield row, doc, dict(options)


def _judged(name: str, task: "BenchmarkTask", answers: dict[int, str]) -> Iterator[dict[str, Any]]:
    """The rows with the answers, which come by document number."""
    from mgvq.evaluation.tasks.judges import JUDGES

    judge = JUDGES[name]
    for doc_id, (row, doc, options) in enumerate(_rows(name, task)):
        text = answers[doc_id]
        if options:
            letter = judge.chosen(doc, text)
            parsed, score = letter is not None, float(letter == row["answer"])
            wrong = parsed and not score
            corrected = score - wrong / max(1, len(options) - 1)
        else:
            parsed, score = bool(text.strip()), float(judge.scores(doc, text))
            corrected = score
        yield {**row, "prediction": text, "parsed": parsed, "score": score, "corrected": corrected}


def metrics(name: str, samples: pd.DataFrame) -> dict[str, float]:
    """Of one task: `accuracy`, the mean score (also by type), with no point for an answer that names none; `unparsed`.

    Where there are options to choose from, also `chance`, what choosing blindly would score, and `corrected`: a wrong choice of k
    options costs 1/(k - 1), so that blind choices and unreadable answers both come to 0 and right ones to 1.
    """
    by_type = samples.groupby("type").score.mean()
    guessing = {f"{name}/chance": float(samples.chance.mean()), f"{name}/corrected": float(samples.corrected.mean())}
    return {
        f"{name}/accuracy": float(samples.score.mean()),
        **{f"{name}/accuracy/{kind}": float(value) for kind, value in by_type.items()},
        f"{name}/unparsed": float(1 - samples.parsed.mean()),
        **(guessing if samples.chance.any() else {}),
    }


def averages(samples: pd.DataFrame) -> dict[str, float]:
    """Of all tasks, each counting alike: accuracy, `corrected` (where there is nothing to choose from, the score), `unparsed`."""
    by_task = samples.groupby("task")[["score", "corrected", "parsed"]].mean()
    score, corrected, parsed = map(float, np.asarray(by_task).mean(0))
    return {"suite/accuracy": score, "suite/corrected": corrected, "suite/unparsed": 1 - parsed}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=lambda raw: hashlib.sha256(raw).hexdigest())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _pictures(value: Any) -> Iterator[bytes]:
    """The bytes of the pictures in a row as it is stored."""
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _pictures(part)
