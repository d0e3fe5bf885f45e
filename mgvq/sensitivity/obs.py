"""The saliency of Optimal Brain Surgeon: the output error that is left when all other channels make up for one."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.linalg import damped
from mgvq.sensitivity.channels import LayerScore, check_damping, column_norms, second_moment
from mgvq.types import SiteStats


@dataclass(frozen=True, kw_only=True)
class Obs(LayerScore):
    """`||W_:c||^2 / [(A + l I)^-1]_cc / E||W x||^2`, relative to the mean square of the layer's output.

    `A = E[x x^T]` (Hassibi and Stork 1993; docs/method.md, eq. (obs)). A dead channel keeps the small score `l ||W_:c||^2`. A
    layer whose output is zero scores 0.
    """

    damping: float
    """l as a share of A's diagonal, in (0, 1]."""
    damping_of: str = "mean"
    """What it is a share of: the `mean` of the diagonal, its `median`, or each `channel`'s own entry (`linalg.damping_unit`).
    With the mean, a massive channel leaves all others the score `l ||W_:c||^2`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping(self.damping, self.damping_of)

    def score(self, weight: Float[Tensor, "out in"], stats: SiteStats) -> Float[Tensor, "in"]:
        moment = second_moment(weight, stats, self.modality)
        wide = weight.double()
        output_power = ((wide @ moment) * wide).sum()
        if output_power <= 0:
            return torch.zeros_like(wide[0])
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(moment, self.damping, self.damping_of)))
        return column_norms(weight) / inverse.diagonal() / output_power
