"""Perplexity and KL to the full-precision model on English prose: the reference of the Python language."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from transformers import PreTrainedModel

from mgvq.checks import whole_number
from mgvq.data.english import language_reference
from mgvq.errors import UserError
from mgvq.evaluation.forced import score
from mgvq.evaluation.means import missing_flags, num_broken, weighted
from mgvq.model.text import Passage, text_batches
from mgvq.rng import generator
from mgvq.types import EvalResult

_BATCH = 2  # fixed: the last digits of the losses move with it


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Passages of English prose, each read by itself; all its tokens are predicted but a first one that nothing precedes."""

    num_passages: int
    seed: int  # draws the passages; not the run's, so that all runs read the same
    shows_images: ClassVar[bool] = False

    def __post_init__(self) -> None:
        whole_number("evaluation.num_passages", self.num_passages, least=1)
        whole_number("evaluation.seed", self.seed)
        if self.num_passages > (number := len(language_reference().passages)):
            raise UserError(f"evaluation.num_passages={self.num_passages}, but there are {number} passages; lower it.")

    @property
    def texts(self) -> Mapping[str, str]:
        return {"evaluation": language_reference().sha256}

    def __call__(self, model: PreTrainedModel, reference: PreTrainedModel | None, processor: Any, label: str) -> EvalResult:
        """One row a passage, its `type` the topic of the reference; no prediction and no score.

        `loss/answer` and `kl/full_precision` are nats a token, `text/perplexity` is the exponential of the former.
        """
        passages = self.draw()
        scored = score(model, reference, text_batches(processor, passages, _BATCH))
        samples = pd.DataFrame([_row(p) for p in passages])
        for name in ("loss", "kl", "num_tokens"):
            samples[name] = [getattr(scored[p.sample_id], name) for p in passages]
        found = metrics(samples)
        return EvalResult(
            found, samples, missing_flags(found, lambda n: num_broken(samples["kl" if n.startswith("kl/") else "loss"]))
        )

    def draw(self) -> list[Passage]:
        """The passages, in the order of the reference."""
        passages = list(language_reference().passages.items())
        order = torch.randperm(len(passages), generator=generator(self.seed, "evaluation"))[: self.num_passages]
        return [Passage(*passages[index]) for index in sorted(order.tolist())]


def _row(passage: Passage) -> dict[str, Any]:
    topic = passage.sample_id.rpartition("-")[0]
    known = {"task": "perplexity", "sample_id": passage.sample_id, "type": topic, "question": "", "answer": passage.text}
    digest = hashlib.sha256(passage.text.encode()).hexdigest()[:16]
    return {**known, "sample_hash": digest, "prediction": "", "score": math.nan}


def metrics(samples: pd.DataFrame) -> dict[str, float]:
    """The loss, KL and perplexity of all tokens alike; NaN as soon as one passage has no finite loss (or KL)."""
    loss = weighted(samples.loss, samples.num_tokens)
    return {
        "text/perplexity": math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.nan,
        "loss/answer": loss,
        "kl/full_precision": weighted(samples.kl, samples.num_tokens),
    }
