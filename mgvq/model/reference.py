"""The full-precision model as evaluations ask it: what its head reads for the answers of a batch, which may be known already."""

import hashlib
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from mgvq.model.answers import answer_states, logits
from mgvq.model.pack import PackedBatch
from mgvq.types import Batch


@dataclass
class Reference:
    """A model that is compared with. It runs no batch whose states it has: a study of many arms asks each of them once."""

    model: PreTrainedModel
    kept: dict[str, Tensor] = field(default_factory=dict)  # the states of every batch, on the CPU, by the digest of its inputs

    def states(self, batch: Batch | PackedBatch) -> Float[Tensor, "answers hidden"]:
        """What `answers.answer_states` gives, to the bit; the batch is on the model's device."""
        name = _digest(batch)
        if name not in self.kept:
            self.kept[name] = answer_states(self.model, batch).cpu()
        return self.kept[name].to(self.model.device)

    def logits(self, states: Float[Tensor, "answers hidden"]) -> Float[Tensor, "answers vocabulary"]:
        """What the head makes of states, in float32."""
        return logits(self.model, states)


def _digest(batch: Batch | PackedBatch) -> str:
    """The SHA-256 of all that the model reads, and of which tokens are answers."""
    digest = hashlib.sha256()
    for name, tensor in sorted({**batch.inputs, "loss_mask": batch.loss_mask}.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
