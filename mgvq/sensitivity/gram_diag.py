"""The Hessian diagonal of GPTQ, by which its act-order sorts."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mgvq.sensitivity.channels import LayerScore, channel_power
from mgvq.types import SiteStats


@dataclass(frozen=True, kw_only=True)
class GramDiag(LayerScore):
    """`A_cc = E[x_c^2]` (Frantar et al. 2023, `--act-order` in its code); the weights are not looked at."""

    def score(self, weight: Float[Tensor, "out in"], stats: SiteStats) -> Float[Tensor, "in"]:
        return channel_power(weight, stats, self.modality)
