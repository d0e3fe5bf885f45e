"""The logits that predict the tokens of right answers, in one forward pass."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.model.pack import PackedBatch
from mgvq.types import Batch


def answer_logits(model: Any, batch: Batch | PackedBatch) -> Float[Tensor, "answers vocabulary"]:
    """float32, row by row, of a transformers model with a language head. The head is applied at the answer positions only."""
    hidden = model.base_model(**batch.inputs, use_cache=False).last_hidden_state
    before = torch.nn.functional.pad(batch.loss_mask[:, 1:], (0, 1))
    return model.get_output_embeddings()(hidden[before]).float()
