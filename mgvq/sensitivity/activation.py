"""The activation magnitude of AWQ."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mgvq.sensitivity.channels import LayerScore, channel_power
from mgvq.types import SiteStats


@dataclass(frozen=True, kw_only=True)
class Activation(LayerScore):
    """The root mean square of the channel's activations, `sqrt(E[x_c^2])`.

    AWQ (Lin et al. 2024) takes `E|x_c|` instead, which is not collected; the two order channels alike where their distributions
    have the same shape. The weights are not looked at.
    """

    def score(self, weight: Float[Tensor, "out in"], stats: SiteStats) -> Float[Tensor, "in"]:
        return channel_power(weight, stats, self.modality).clamp(min=0).sqrt()
