"""The squared norm of a channel's weights, without any data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from mgvq.sensitivity.channels import as_score, column_norms
from mgvq.types import Needs, Site, StatsBank


@dataclass(frozen=True, kw_only=True)
class WeightNorm:
    """`||W_:c||^2`: the squared error that losing the channel makes in the weights."""

    needs: ClassVar[Needs] = Needs()
    needs_images: ClassVar[bool] = False

    def __call__(self, weights: Mapping[Site, Float[Tensor, "_ _"]], bank: StatsBank) -> Mapping[Site, Float[Tensor, "_"]]:
        return {site: as_score(column_norms(weight)) for site, weight in weights.items()}
