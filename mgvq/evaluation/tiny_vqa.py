"""The tiny VQA: answers through lmms-eval's generation (or teacher-forced), answer loss, and KL to the full-precision model."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from mgvq.checks import whole_number
from mgvq.data.tiny_vqa.dataset import MOST_QUESTIONS
from mgvq.data.tiny_vqa.questions import parses
from mgvq.errors import UserError
from mgvq.evaluation.documents import documents, headline_accuracy, is_right
from mgvq.evaluation.forced import score
from mgvq.evaluation.means import by_type, mean, missing_flags, num_broken, weighted
from mgvq.model.encode import Example, batches
from mgvq.model.pack import can_pack, packed_batches
from mgvq.model.reference import Reference
from mgvq.types import EvalResult

_BATCH = 125  # fixed: the last digits of the losses move with it
_IMAGES = 32  # in a packed batch; fixed likewise


@dataclass(frozen=True, kw_only=True)
class TinyVQA:
    """Test questions about images that nothing was trained or calibrated on."""

    num_questions: int
    seed: int  # draws the questions; not the run's, so that all runs answer the same
    answers: str  # generated: token by token | forced: the model's first choices along the right answer (equal scores, faster)
    shows_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole_number("evaluation.num_questions", self.num_questions, least=1, most=MOST_QUESTIONS)
        whole_number("evaluation.seed", self.seed)
        if self.answers not in ("generated", "forced"):
            raise UserError(f"evaluation.answers must be generated or forced, got {self.answers!r}")

    def __call__(self, model: PreTrainedModel, reference: Reference | None, processor: Any, label: str) -> EvalResult:
        """One row a question. `loss/answer` and `kl/full_precision` are nats a token of the right answers."""
        docs = documents(self.seed, self.num_questions)
        examples = [Example(d["sample_id"], d["image"], d["question"], d["answer"]) for d in docs]
        packed = can_pack(model)
        questions = packed_batches(processor, examples, _IMAGES) if packed else batches(processor, examples, _BATCH)
        forced = score(model, reference, questions)
        if self.answers == "generated":
            # Here: lmms-eval takes seconds to import, and forced answers need none of it.
            from mgvq.evaluation.harness import evaluate
            from mgvq.evaluation.tasks.tiny_vqa import TinyVQATask

            _, rows = evaluate(model, processor, TinyVQATask(docs), label, _BATCH)
            predictions = {docs[row["doc_id"]]["sample_id"]: row["filtered_resps"][0] for row in rows}
            broken = {docs[row["doc_id"]]["sample_id"] for row in rows if not row["reply"].finite}
        else:
            decode = processor.tokenizer.decode
            broken = set()
            predictions = {key: decode(f.predicted, skip_special_tokens=True).strip() for key, f in forced.items()}
        samples = pd.DataFrame([_row(d, predictions[d["sample_id"]]) for d in docs])
        samples["loss"] = [math.nan if i in broken else forced[i].loss for i in samples.sample_id]
        samples["kl"] = [forced[i].kl for i in samples.sample_id]
        samples["num_tokens"] = [forced[i].num_tokens for i in samples.sample_id]
        samples.loc[~np.isfinite(samples.loss), "score"] = (
            math.nan
        )  # an answer of numbers that are none is neither right nor wrong
        found = metrics(samples)
        asked = [forced[i] for i in samples.sample_id]
        expected = pd.DataFrame({"score": [float(f.reference_exact) for f in asked], "loss": [f.reference_loss for f in asked]})
        flags = missing_flags(found, lambda name: num_broken(samples[_column(name)]))
        return EvalResult(found, samples, flags, None if reference is None else expected)


def _column(metric: str) -> str:
    """The column of samples that takes the metric away where it is not finite."""
    return "kl" if metric.startswith("kl/") else "loss"


def _row(doc: dict[str, Any], prediction: str) -> dict[str, Any]:
    kept = {k: doc[k] for k in ("sample_id", "sample_hash", "type", "question", "answer")}
    parsed = parses(doc["type"], prediction)
    return {"task": "tiny_vqa", **kept, "prediction": prediction, "parsed": parsed, "score": float(is_right(doc, prediction))}


def metrics(samples: pd.DataFrame) -> dict[str, float]:
    """Headline accuracy, accuracy by type, share of answers that are none, loss and KL a token.

    A metric is NaN as soon as one of its samples has no finite loss (of `kl/full_precision`: no finite KL).
    """
    parsed = samples.parsed.where(np.isfinite(samples.loss), math.nan)
    return {
        "tiny_vqa/accuracy": headline_accuracy(
            [{"type": t, "score": s} for t, s in zip(samples.type, samples.score, strict=True)]
        ),
        **{f"tiny_vqa/accuracy/{kind}": value for kind, value in by_type(samples, "score").items()},
        "tiny_vqa/unparsed": 1 - mean(parsed),
        "loss/answer": weighted(samples.loss, samples.num_tokens),
        "kl/full_precision": weighted(samples.kl, samples.num_tokens),
    }
