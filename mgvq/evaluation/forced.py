"""Teacher-forced evaluation: the right answer is given token by token, and the model's prediction of each token is looked at.

Exact match of all answer tokens equals the exact match of greedy decoding, at the cost of one forward pass.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from mgvq.model.answers import answer_logits
from mgvq.model.pack import PackedBatch
from mgvq.progress import progress
from mgvq.types import Batch


@dataclass(frozen=True, slots=True)
class Forced:
    """One answer: nats summed over its tokens, how many they are, whether each is the model's first choice, and its words."""

    loss: float
    kl: float
    num_tokens: int
    exact: bool
    predicted: tuple[int, ...]  # the first choices, end-of-sequence token included


@torch.inference_mode()
def score(model: PreTrainedModel, reference: PreTrainedModel | None, batches: Iterable[Batch | PackedBatch]) -> dict[str, Forced]:
    """By sample id. `kl` is KL(reference || model), 0 without a reference."""
    scored: dict[str, Forced] = {}
    for batch in progress(batches, "answers"):
        batch = batch.to(model.device, model.dtype) if isinstance(batch, PackedBatch) else batch.to(model.device)
        targets = batch.inputs["input_ids"][batch.loss_mask]
        logs = answer_logits(model, batch).log_softmax(-1)
        losses = -logs.gather(1, targets[:, None])[:, 0]
        divergence = torch.zeros_like(losses)
        if reference is not None and reference is not model:
            expected = answer_logits(reference, batch).log_softmax(-1)
            divergence = (expected.exp() * (expected - logs)).sum(-1)
        chosen = logs.argmax(-1)
        sizes = list(batch.sizes) if isinstance(batch, PackedBatch) else batch.loss_mask.sum(1).tolist()
        columns = (t.split(sizes) for t in (losses, divergence, chosen, targets))
        for sample_id, loss, kl, choice, target in zip(batch.sample_ids, *columns, strict=True):
            exact = bool(torch.equal(choice, target))
            scored[sample_id] = Forced(loss.sum().item(), kl.sum().item(), len(loss), exact, tuple(choice.tolist()))
    return scored
