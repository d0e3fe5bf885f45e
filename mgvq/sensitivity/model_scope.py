"""MGVQ's *global* sensitivity (`global` is a word of Python), whose scope is the loss of the whole model."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.sensitivity.channels import LayerScore, column_norms, fisher_blocks
from mgvq.types import Needs, SiteStats


@dataclass(frozen=True, kw_only=True)
class ModelScope(LayerScore):
    """`1/2 s_c^2 tr(F_c)` with `s_c^2 = ||W_:c||^2 / out` (docs/method.md, eq. (fisher)).

    This is `1/2 E[e^T F_c e]`, the expected increase of the mean answer loss in nats, for a channel error e that prefers no
    direction (`E[e e^T] = s_c^2 I`: a relative squared error of 1). F_c is the channel's block of the Fisher that
    `channels.fisher_blocks` derives, with `tr(F_c) = sum gram_cc tr(fisher) / (tokens * answers)` over the modalities. It is a
    reconstruction: the paper's equation is not public.
    """

    needs: ClassVar[Needs] = Needs(gram=True, fisher=True)

    def score(self, weight: Float[Tensor, "out in"], stats: SiteStats) -> Float[Tensor, "in"]:
        trace = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
        for power, fisher in fisher_blocks(weight, stats, self.modality):
            trace += power * fisher.trace()
        return column_norms(weight) / weight.shape[0] * trace / 2
