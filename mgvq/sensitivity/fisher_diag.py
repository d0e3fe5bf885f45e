"""A score by the diagonal of the Fisher, which takes weights as independent of each other."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.sensitivity.channels import LayerScore, fisher_blocks
from mgvq.types import Needs, SiteStats


@dataclass(frozen=True, kw_only=True)
class FisherDiag(LayerScore):
    """`1/2 sum_r F_rc W_rc^2` in nats of the mean answer loss: the saliency of OBD (LeCun et al. 1990), summed over the channel.

    `F_rc = sum gram_cc fisher_rr / (tokens * answers)` over the modalities is the Kronecker estimate of each weight's Fisher
    (docs/method.md, eq. (fisher)).
    """

    needs: ClassVar[Needs] = Needs(gram=True, fisher=True)

    def score(self, weight: Float[Tensor, "out in"], stats: SiteStats) -> Float[Tensor, "in"]:
        squares = weight.double().square()
        total = torch.zeros_like(squares[0])
        for power, fisher in fisher_blocks(weight, stats, self.modality):
            total += power * (fisher.diagonal() @ squares)
        return total / 2
