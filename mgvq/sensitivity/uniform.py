"""Every channel counts alike: what any other score has to beat."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.types import Needs, Site, StatsBank


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Every channel scores 1."""

    needs: ClassVar[Needs] = Needs()
    needs_images: ClassVar[bool] = False

    def __call__(self, weights: Mapping[Site, Float[Tensor, "_ _"]], bank: StatsBank) -> Mapping[Site, Float[Tensor, "_"]]:
        return {site: torch.ones(site.in_features) for site in weights}
