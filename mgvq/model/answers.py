"""The logits that predict the tokens of right answers, in one forward pass."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.errors import UserError
from mgvq.model.classes import num_positions
from mgvq.model.pack import PackedBatch
from mgvq.types import Batch

_LEAST = 64  # tokens whose logits are there at a time, where there are as many
_LOGITS = 2**23  # about as many at a time: each step from them to a loss makes a copy


def answer_states(model: Any, batch: Batch | PackedBatch) -> Float[Tensor, "answers hidden"]:
    """What the head of a transformers model reads where it predicts the answer tokens, row by row.

    Raises UserError for rows that are longer than the model has positions.
    """
    limit, length = num_positions(model.config), _length(batch)
    if limit is not None and length > limit:
        raise UserError(
            f"a sample has {length} tokens, and {type(model).__name__} was made for {limit} positions (max_position_embeddings): "
            f"shorten or leave out the longest of {', '.join(batch.sample_ids[:3])}, ..."
        )
    hidden = model.base_model(**batch.inputs, use_cache=False).last_hidden_state
    before = torch.nn.functional.pad(batch.loss_mask[:, 1:], (0, 1))
    return hidden[before]


def num_answers(batch: Batch | PackedBatch) -> int:
    """How many states `answer_states` gives: a first token has no position before it that would predict it."""
    return int(batch.loss_mask[:, 1:].sum())


def answers_by_sample(batch: Batch | PackedBatch) -> list[int]:
    """The same sample by sample, in the order of the states."""
    return list(batch.sizes) if isinstance(batch, PackedBatch) else batch.loss_mask[:, 1:].sum(1).tolist()


def logits(model: Any, states: Float[Tensor, "answers hidden"]) -> Float[Tensor, "answers vocabulary"]:
    """What the head makes of its inputs, in float32."""
    return model.get_output_embeddings()(states).float()


def vocabulary_of(model: Any) -> int:
    """How many logits a token has."""
    return model.config.get_text_config(decoder=True).vocab_size


def runs_of_answers(number: int, vocabulary: int) -> list[slice]:
    """Answer tokens in runs of a multiple of `_LEAST`; a last run has what is left over, and no fewer where there are as many.

    A product of a few rows adds up in another order than that of many rows, which has the same bits however it is cut.
    """
    size = max(1, _LOGITS // vocabulary // _LEAST) * _LEAST
    starts = range(0, max(1, number - _LEAST + 1), size)
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], number], strict=True)]


def logs_in_runs(model: Any, states: Float[Tensor, "answers hidden"]) -> Iterator[tuple[slice, Float[Tensor, "few vocabulary"]]]:
    """The log-probabilities of one run of answer tokens after the other, and which those are: of a large vocabulary those of all
    take gigabytes."""
    for few in runs_of_answers(len(states), vocabulary_of(model)):
        yield few, logits(model, states[few]).log_softmax(-1)


def answer_logits(model: Any, batch: Batch | PackedBatch) -> Float[Tensor, "answers vocabulary"]:
    """float32, row by row, of a transformers model with a language head. The head is applied at the answer positions only."""
    return logits(model, answer_states(model, batch))


def _length(batch: Batch | PackedBatch) -> int:
    """Tokens of the longest sample; the samples of a packed row have positions of their own, which start again."""
    if isinstance(batch, PackedBatch):
        return int(batch.inputs["position_ids"].max()) + 1
    return batch.valid_mask.shape[1]
