"""The score of Wanda, squared and summed over a channel."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mgvq.sensitivity.channels import LayerScore, channel_power, column_norms
from mgvq.types import SiteStats


@dataclass(frozen=True, kw_only=True)
class Wanda(LayerScore):
    """`A_cc ||W_:c||^2`, the squared error of the layer's output at a token when the channel is lost.

    Wanda (Sun et al. 2023) scores a weight by `|W_rc| ||x_c||`; this is the sum of its squares over the channel.
    """

    def score(self, weight: Float[Tensor, "out in"], stats: SiteStats) -> Float[Tensor, "in"]:
        return channel_power(weight, stats, self.modality) * column_norms(weight)
