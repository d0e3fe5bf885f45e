"""Teacher-forced evaluation: the right answer is given token by token, and the model's prediction of each token is looked at.

Exact match of all answer tokens equals the exact match of greedy decoding, at the cost of one forward pass.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from mgvq.model.answers import answer_states, answers_by_sample, logits, runs_of_answers, vocabulary_of
from mgvq.model.pack import PackedBatch
from mgvq.model.reference import Reference
from mgvq.progress import progress
from mgvq.types import Batch

_CUT = (
    2**27
)  # logits after which runs of tokens begin anew; fixed: where they end moves the last digits, as `runs_of_answers` says


@dataclass(frozen=True, slots=True)
class Forced:
    """What a model makes of one right answer."""

    loss: float  # nats, summed over the answer's tokens; NaN where a logit is NaN or infinite
    kl: float  # KL(reference || model) in nats, summed likewise; 0 without a reference
    num_tokens: int  # tokens of the answer, its end token included
    predicted: tuple[int, ...]  # the first choices
    reference_loss: float  # the loss of the reference; the model's own without one
    reference_exact: bool  # whether each token is the reference's first choice


@torch.inference_mode()
def score(
    model: PreTrainedModel, reference: Reference | PreTrainedModel | None, batches: Iterable[Batch | PackedBatch]
) -> dict[str, Forced]:
    """What `model` makes of the right answers, by sample id; `reference` is the full-precision model that it is compared with."""
    asked = reference if reference is None or isinstance(reference, Reference) else Reference(reference)
    scored: dict[str, Forced] = {}
    for batch in progress(batches, "batches of answers"):
        batch = batch.to(model.device, model.dtype) if isinstance(batch, PackedBatch) else batch.to(model.device)
        targets = batch.inputs["input_ids"][batch.loss_mask]
        compared = asked if asked is not None and asked.model is not model else None
        states = answer_states(model, batch)
        expected = compared.states(batch) if compared else states
        size = max(1, _CUT // vocabulary_of(model))
        parts = [
            _scored(model, compared, *part)
            for part in zip(targets.split(size), states.split(size), expected.split(size), strict=True)
        ]
        losses, divergence, chosen, expected_losses, expected_chosen = map(torch.cat, zip(*parts, strict=True))
        sizes = answers_by_sample(batch)
        columns = (t.split(sizes) for t in (losses, divergence, chosen, expected_losses, expected_chosen, targets))
        for sample_id, loss, kl, choice, expected_loss, expected_choice, target in zip(batch.sample_ids, *columns, strict=True):
            total = loss.sum().item()
            other = expected_loss.sum().item(), bool(torch.equal(expected_choice, target))
            scored[sample_id] = Forced(total, kl.sum().item(), len(loss), tuple(choice.tolist()), *other)
    return scored


def _scored(
    model: PreTrainedModel, reference: Reference | None, targets: Tensor, states: Tensor, expected_states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, divergences and first choices of some tokens, then the reference's losses and first choices.

    Its states are read where there is one; without one these are the model's own.
    """
    parts = []
    for few in runs_of_answers(len(targets), vocabulary_of(model)):
        expected = None if reference is None else reference.logits(expected_states[few])
        parts.append(_compared(logits(model, states[few]), expected, targets[few]))
    losses, divergences, chosen, expected_losses, expected_chosen = map(torch.cat, zip(*parts, strict=True))
    return losses, divergences, chosen, expected_losses, expected_chosen


def _compared(found: Tensor, expected: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same of the logits of a few tokens; each step makes a copy of them."""
    logs = _log_probabilities(found)
    losses = -logs.gather(1, targets[:, None])[:, 0]
    if expected is None:
        return losses, torch.zeros_like(losses), logs.argmax(-1), losses, logs.argmax(-1)
    expected = _log_probabilities(expected)
    divergence = (expected.exp() * (expected - logs)).sum(-1)
    return losses, divergence, logs.argmax(-1), -expected.gather(1, targets[:, None])[:, 0], expected.argmax(-1)


def _log_probabilities(logits: Float[Tensor, "answers vocabulary"]) -> Float[Tensor, "answers vocabulary"]:
    """NaN for all tokens of a position where one logit is not finite: an infinite one would leave others looking sound."""
    sound = torch.isfinite(logits).all(-1, keepdim=True)
    return (logits if sound.all() else logits.masked_fill(~sound, torch.nan)).log_softmax(-1)
