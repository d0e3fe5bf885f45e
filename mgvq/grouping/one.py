"""One group: all input channels of a layer share a codebook and a rate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.types import Needs, Site, StatsBank


@dataclass(frozen=True, kw_only=True)
class One:
    """One group a layer: no ids are stored, and no scores are looked at."""

    num_groups: ClassVar[int] = 1
    needs: ClassVar[Needs] = Needs()
    uses_score: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False

    def __call__(self, scores: Mapping[Site, Float[Tensor, "_"]], bank: StatsBank) -> Mapping[Site, Int[Tensor, "_"]]:
        return {site: torch.zeros(site.in_features, dtype=torch.int32) for site in scores}
