"""The tiny VQA: answers through lmms-eval's generation (or teacher-forced), answer loss, and KL to the full-precision model."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
from transformers import PreTrainedModel

from mgvq.data.tiny_vqa.questions import parses
from mgvq.errors import UserError
from mgvq.evaluation.documents import documents, headline_accuracy, is_right
from mgvq.evaluation.forced import score
from mgvq.model.encode import Example, batches
from mgvq.model.pack import can_pack, packed_batches
from mgvq.types import EvalResult

_BATCH = 125  # fixed: the last digits of the losses move with it
_PICTURES = 32  # in a packed batch; fixed likewise


@dataclass(frozen=True, kw_only=True)
class TinyVQA:
    """`num_questions` test questions drawn by `seed`; `answers`: `generated` token by token, or `forced` (equal scores)."""

    num_questions: int
    seed: int
    answers: str  # generated | forced
    shows_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (isinstance(self.num_questions, int) and self.num_questions >= 1):
            raise UserError(f"evaluation.num_questions must be a whole number >= 1, got {self.num_questions!r}")
        if not (isinstance(self.seed, int) and self.seed >= 0):
            raise UserError(f"evaluation.seed must be a whole number >= 0, got {self.seed!r}")
        if self.answers not in ("generated", "forced"):
            raise UserError(f"evaluation.answers must be generated or forced, got {self.answers!r}")

    def __call__(self, model: PreTrainedModel, reference: PreTrainedModel | None, processor: Any, label: str) -> EvalResult:
        """One row a question. `loss/answer` and `kl/full_precision` are nats a token of the right answers."""
        docs = documents(self.seed, self.num_questions)
        examples = [Example(d["sample_id"], d["image"], d["question"], d["answer"]) for d in docs]
        packed = can_pack(model)
        questions = packed_batches(processor, examples, _PICTURES) if packed else batches(processor, examples, _BATCH)
        forced = score(model, reference, questions)
        if self.answers == "generated":
            # Here: lmms-eval takes seconds to import, and forced answers need none of it.
            from mgvq.evaluation.harness import evaluate
            from mgvq.evaluation.tasks.tiny_vqa import TinyVQATask

            _, rows = evaluate(model, processor, TinyVQATask(docs), label, _BATCH)
            predictions = {docs[row["doc_id"]]["sample_id"]: row["filtered_resps"][0] for row in rows}
        else:
            decode = processor.tokenizer.decode
            predictions = {key: decode(f.predicted, skip_special_tokens=True).strip() for key, f in forced.items()}
        samples = pd.DataFrame([_row(d, predictions[d["sample_id"]]) for d in docs])
        samples["loss"] = [forced[i].loss for i in samples.sample_id]
        samples["kl"] = [forced[i].kl for i in samples.sample_id]
        samples["num_tokens"] = [forced[i].num_tokens for i in samples.sample_id]
        return EvalResult(metrics(samples), samples)


def _row(doc: dict[str, Any], prediction: str) -> dict[str, Any]:
    kept = {k: doc[k] for k in ("sample_id", "sample_hash", "type", "question", "answer")}
    parsed = parses(doc["type"], prediction)
    return {"task": "tiny_vqa", **kept, "prediction": prediction, "parsed": parsed, "score": float(is_right(doc, prediction))}


def metrics(samples: pd.DataFrame) -> dict[str, float]:
    """Headline accuracy, accuracy by type, share of answers that are none, loss and KL a token."""
    by_type = samples.groupby("type").score.mean()
    tokens = samples.num_tokens.sum()
    return {
        "tiny_vqa/accuracy": headline_accuracy(
            [{"type": t, "score": s} for t, s in zip(samples.type, samples.score, strict=True)]
        ),
        **{f"tiny_vqa/accuracy/{kind}": float(value) for kind, value in by_type.items()},
        "tiny_vqa/unparsed": float(1 - samples.parsed.mean()),
        "loss/answer": float(samples.loss.sum() / tokens),
        "kl/full_precision": float(samples.kl.sum() / tokens),
    }
