"""MGVQ's fusion of global and local sensitivity, in both readings of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from mgvq.errors import UserError
from mgvq.sensitivity.channels import LayerScore, as_score, geometric_mean
from mgvq.sensitivity.model_scope import ModelScope
from mgvq.sensitivity.obs import Obs
from mgvq.types import Needs, Site, StatsBank

READINGS = ("scope", "split")


@dataclass(frozen=True, kw_only=True)
class GlobalLocal:
    """Fuses `model_scope` g and `obs` o; a reconstruction, the paper's equation is not public (method 3.6).

    `reading=scope` is reading A, global and local as scopes of the loss: `(g_c / GM_model(g))^alpha (o_c / GM_layer(o))^(1 -
    alpha)`, with the geometric means GM over all channels, of the model and of the layer, that do not score 0. With `alpha` 1
    it orders as `model_scope` does, with 0 it is `layer_scope`. `reading=split` is reading B, global between layers and local
    within: a layer gets `sum_c g_c` and deals it out to its channels in proportion to o_c; it has no `alpha` (null).

    A channel that scores 0 on a side that counts scores 0. `modality` goes to both sides, `damping` to `obs`.
    """

    reading: str  # scope | split
    alpha: float | None
    damping: float
    modality: str
    needs: ClassVar[Needs] = Needs(gram=True, gradients=True)

    def __post_init__(self) -> None:
        if self.reading not in READINGS:
            raise UserError(f"sensitivity.reading must be one of {', '.join(READINGS)}; got {self.reading!r}")
        if self.reading == "split" and self.alpha is not None:
            raise UserError(f"sensitivity.alpha={self.alpha:g} has no effect with sensitivity.reading=split: set it to null.")
        if self.reading == "scope" and not (self.alpha is not None and 0 <= self.alpha <= 1):
            raise UserError(f"sensitivity.alpha, the weight of the global side, must lie in [0, 1], got {self.alpha!r}")
        self._parts()  # check the rest

    @property
    def needs_images(self) -> bool:
        return self.modality == "image"

    def __call__(self, weights: Mapping[Site, Float[Tensor, "_ _"]], bank: StatsBank) -> Mapping[Site, Float[Tensor, "_"]]:
        whole, local = ({s: part.score(w, bank[s]) for s, w in weights.items()} for part in self._parts())
        if self.alpha is None:
            return {s: as_score(whole[s].sum() * local[s] / local[s].sum().clamp(min=1e-300)) for s in weights}
        mean = geometric_mean(whole.values())
        ratios = {s: (whole[s].clamp(min=0) / mean, local[s] / geometric_mean([local[s]])) for s in weights}
        return {s: as_score(g**self.alpha * o ** (1 - self.alpha)) for s, (g, o) in ratios.items()}

    def _parts(self) -> tuple[LayerScore, LayerScore]:
        return ModelScope(modality=self.modality), Obs(modality=self.modality, damping=self.damping)
