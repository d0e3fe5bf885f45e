"""Random scores: they show what an allocation gains from *having* groups, whatever is in them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.rng import generator
from mgvq.types import Needs, Site, StatsBank


@dataclass(frozen=True, kw_only=True)
class Random:
    """Log-normal scores, `exp(z)` with z standard normal, whose spread is like that of the measured scores."""

    seed: int
    """The seed of the random streams, one for every layer."""
    needs: ClassVar[Needs] = Needs()
    needs_images: ClassVar[bool] = False

    def __call__(self, weights: Mapping[Site, Float[Tensor, "_ _"]], bank: StatsBank) -> Mapping[Site, Float[Tensor, "_"]]:
        return {
            site: torch.randn(weight.shape[1], generator=generator(self.seed, "sensitivity", site.name)).exp()
            for site, weight in weights.items()
        }
