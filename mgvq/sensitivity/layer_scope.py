"""MGVQ's *local* sensitivity, whose scope is the output of the channel's own layer."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mgvq.sensitivity.channels import as_score, geometric_mean
from mgvq.sensitivity.obs import Obs
from mgvq.types import Site, StatsBank


@dataclass(frozen=True, kw_only=True)
class LayerScope(Obs):
    """The OBS saliency over its geometric mean in the layer (docs/method.md, eq. (obs) and (global-local)).

    It says how the channels of one layer compare and nothing about how layers do, which is what `global_local` reads of its local
    side. It is a reconstruction: the paper's equation is not public.
    """

    def __call__(self, weights: Mapping[Site, Float[Tensor, "_ _"]], bank: StatsBank) -> Mapping[Site, Float[Tensor, "_"]]:
        return {site: as_score(score / geometric_mean([score])) for site, score in self.scores(weights, bank).items()}
