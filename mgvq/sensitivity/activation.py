"""The activation magnitude of AWQ."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mgvq.sensitivity.channels import LayerScore, channel_power
from mgvq.types import SiteStats


@dataclass(frozen=True, kw_only=True)
class Activation(LayerScore):
    """`sqrt(E[x_c^2])`.

    A deviation: AWQ (Lin et al. 2024) takes `E|x_c|`, which is not collected. The two order alike where all channels have one
    shape of distribution. The weights are not looked at.
    """

    def score(self, weight: Float[Tensor, "out in"], stats: SiteStats) -> Float[Tensor, "in"]:
        return channel_power(weight, stats, self.modality).clamp(min=0).sqrt()
