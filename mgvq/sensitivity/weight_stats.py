"""Statistics of the distribution of the weights, without any data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from mgvq.sensitivity.channels import as_score, column_norms
from mgvq.types import Needs, Site, StatsBank


@dataclass(frozen=True, kw_only=True)
class WeightStats:
    """The squared norm of the channel times a tail index, `||W_:c||^2 k_c`.

    `k_c = sum_r W_rc^4 / (3 s^2 sum_r W_rc^2)`, with s^2 the mean square of the layer, is 1 in a Gaussian layer and more where
    the channel's weights lie in the tail of the layer's distribution, which a codebook fitted to the bulk serves badly. A layer
    of zeros scores 0. This reconstructs a reading of MGVQ by a reviewer, "global = model-level weight distribution statistics";
    the paper's equation is not public.
    """

    needs: ClassVar[Needs] = Needs()
    needs_images: ClassVar[bool] = False

    def __call__(self, weights: Mapping[Site, Float[Tensor, "_ _"]], bank: StatsBank) -> Mapping[Site, Float[Tensor, "_"]]:
        return {site: as_score(_score(weight)) for site, weight in weights.items()}


def _score(weight: Float[Tensor, "out in"]) -> Float[Tensor, "in"]:
    mean_square = weight.double().square().mean().clamp(min=1e-300)
    return column_norms(weight.double().square()) / (3 * mean_square)  # the norm of the channel cancels
