"""Perplexity and KL to the full-precision model on prose: a text of the user's own, or the reference of the Python language."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from transformers import PreTrainedModel

from mgvq.checks import whole_number
from mgvq.data.english import language_reference
from mgvq.data.texts import TextSettings
from mgvq.errors import UserError
from mgvq.evaluation.forced import score
from mgvq.evaluation.means import missing_flags, num_broken, weighted
from mgvq.model.reference import Reference
from mgvq.model.text import Passage, text_batches
from mgvq.model.windows import Window, Windows, window_batches
from mgvq.rng import generator
from mgvq.types import EvalResult

_BATCH = 2  # fixed: the last digits of the losses move with it


@dataclass(frozen=True, kw_only=True)
class Perplexity(TextSettings):
    """Passages or windows of prose, each read by itself; all its tokens are predicted but a first one that nothing precedes."""

    num_passages: int | None  # or windows; None: all
    seed: int  # draws the passages; not the run's, so that all runs read the same
    shows_images: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.check_settings("evaluation")
        whole_number("evaluation.seed", self.seed)
        if self.num_passages is None:
            return
        whole_number("evaluation.num_passages", self.num_passages, least=1)
        if self.path is None and self.window is None and self.num_passages > (n := len(language_reference().passages)):
            raise UserError(f"evaluation.num_passages={self.num_passages}, but there are {n} passages; lower it.")

    @property
    def texts(self) -> Mapping[str, str]:
        return {"evaluation": self.sha256(language_reference())}

    def __call__(self, model: PreTrainedModel, reference: Reference | None, processor: Any, label: str) -> EvalResult:
        """One row a passage or window, its `type` the topic of the reference or the document; no prediction and no score.

        `loss/answer` and `kl/full_precision` are nats a token, `text/perplexity` is the exponential of the former.
        """
        passages = self._passages(processor)
        texts = [p for p in passages if isinstance(p, Passage)]
        batches = text_batches(processor, texts, _BATCH) if texts else window_batches(passages, 1)
        scored = score(model, reference, batches)
        samples = pd.DataFrame([_row(p, processor) for p in passages])
        for name in ("loss", "kl", "num_tokens"):
            samples[name] = [getattr(scored[p.sample_id], name) for p in passages]
        found = metrics(samples)
        flags = missing_flags(found, lambda n: num_broken(samples["kl" if n.startswith("kl/") else "loss"]))
        expected = pd.DataFrame({"score": math.nan, "loss": [scored[p.sample_id].reference_loss for p in passages]})
        return EvalResult(found, samples, flags, None if reference is None else expected)

    def draw(self) -> Sequence[Passage | Windows]:
        """The passages, in the order of the text; or all windows together, which are cut once there is a tokenizer."""
        if self.window is not None:
            return [self._windows()]
        return self._drawn([Passage(*passage) for passage in self.corpus(language_reference()).passages.items()])

    def _windows(self) -> Windows:
        assert self.window is not None
        documents, least = self.documents(language_reference()), self.num_passages or 1
        return Windows("evaluation", documents, self.window, self.stride or self.window, least)

    def _passages(self, processor: Any) -> Sequence[Any]:
        return self.draw() if self.window is None else self._drawn(self._windows().cut(processor))

    def _drawn(self, passages: Sequence[Any]) -> list[Any]:
        if len(passages) < (self.num_passages or 1):
            raise UserError(
                f"evaluation.num_passages={self.num_passages}, but {self.path} has {len(passages)} passages; lower it."
            )
        order = torch.randperm(len(passages), generator=generator(self.seed, "evaluation"))[: self.num_passages]
        return [passages[index] for index in sorted(order.tolist())]


def _row(passage: Passage | Window, processor: Any) -> dict[str, Any]:
    tokenizer = getattr(processor, "tokenizer", processor)
    text = passage.text if isinstance(passage, Passage) else tokenizer.decode(passage.ids)
    topic = passage.sample_id.rpartition("-")[0]
    known = {"task": "perplexity", "sample_id": passage.sample_id, "type": topic, "question": "", "answer": text}
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {**known, "sample_hash": digest, "prediction": "", "score": math.nan}


def metrics(samples: pd.DataFrame) -> dict[str, float]:
    """The loss, KL and perplexity of all tokens alike; NaN as soon as one passage has no finite loss (or KL)."""
    loss = weighted(samples.loss, samples.num_tokens)
    return {
        "text/perplexity": math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.nan,
        "loss/answer": loss,
        "kl/full_precision": weighted(samples.kl, samples.num_tokens),
    }
