"""The logits that predict the tokens of right answers, in one forward pass."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.model.pack import PackedBatch
from mgvq.types import Batch


def answer_states(model: Any, batch: Batch | PackedBatch) -> Float[Tensor, "answers hidden"]:
    """What the head of a transformers model reads where it predicts the answer tokens, row by row."""
    hidden = model.base_model(**batch.inputs, use_cache=False).last_hidden_state
    before = torch.nn.functional.pad(batch.loss_mask[:, 1:], (0, 1))
    return hidden[before]


def logits(model: Any, states: Float[Tensor, "answers hidden"]) -> Float[Tensor, "answers vocabulary"]:
    """What the head makes of its inputs, in float32."""
    return model.get_output_embeddings()(states).float()


def answer_logits(model: Any, batch: Batch | PackedBatch) -> Float[Tensor, "answers vocabulary"]:
    """float32, row by row, of a transformers model with a language head. The head is applied at the answer positions only."""
    return logits(model, answer_states(model, batch))
