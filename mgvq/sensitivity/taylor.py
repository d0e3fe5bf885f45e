"""The change of the loss when a channel is lost, to second order in its weights."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.sensitivity.channels import LayerScore, fisher_blocks
from mgvq.types import Needs, SiteStats


@dataclass(frozen=True, kw_only=True)
class Taylor(LayerScore):
    """`|<G_:c, W_:c>| + 1/2 W_:c^T F_c W_:c` in nats of the mean answer loss (docs/method.md, eq. (fisher)).

    G is the gradient of the mean answer loss for the right answers, F_c the channel's block of the Fisher. `modality` selects
    the curvature only: the gradient is that of all tokens.
    """

    needs: ClassVar[Needs] = Needs(gram=True, fisher=True, gradient=True)

    def score(self, weight: Float[Tensor, "out in"], stats: SiteStats) -> Float[Tensor, "in"]:
        assert stats.gradient is not None  # as `needs` says
        wide = weight.double()
        total = torch.zeros_like(wide[0])
        for power, fisher in fisher_blocks(weight, stats, self.modality):
            total += power * (wide * (fisher @ wide)).sum(0)
        return (stats.gradient.to(wide) * wide).sum(0).abs() + total.clamp(min=0) / 2
