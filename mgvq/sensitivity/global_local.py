"""MGVQ's fusion of global and local sensitivity, in both readings of the paper."""

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
    """Fuses the scores g of `model_scope` and o of `obs` (docs/method.md, eq. (global-local)).

    It is a reconstruction: the paper's equation is not public. A channel that scores 0 on a side that counts scores 0.
    """

    reading: str
    """`scope`: global and local are scopes of the loss. The score is `(g_c / GM_model(g))^alpha (o_c / GM_layer(o))^(1 - alpha)`,
    with the geometric means GM over all channels, of the model and of the layer, that do not score 0.
    `split`: global is between layers and local within. A layer gets `sum_c g_c` and deals it out to its channels in proportion to
    o_c."""
    alpha: float | None
    """The weight of the global side with `scope`: 1 orders as `model_scope` does, 0 is `layer_scope`. None with `split`."""
    damping: float
    """The damping of `obs`, a share of the diagonal in (0, 1]."""
    damping_of: str = "mean"
    """What it is a share of, as in `obs`."""
    modality: str
    """`both`, `image` or `text`: the tokens whose statistics count, on both sides."""
    needs: ClassVar[Needs] = Needs(gram=True, fisher=True)

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
        whole, local = (part.scores(weights, bank) for part in self._parts())
        if self.alpha is None:
            return {s: as_score(whole[s].sum() * local[s] / local[s].sum().clamp(min=1e-300)) for s in weights}
        mean = geometric_mean(whole.values())
        ratios = {s: (whole[s].clamp(min=0) / mean, local[s] / geometric_mean([local[s]])) for s in weights}
        return {s: as_score(g**self.alpha * o ** (1 - self.alpha)) for s, (g, o) in ratios.items()}

    def _parts(self) -> tuple[LayerScore, LayerScore]:
        return ModelScope(modality=self.modality), Obs(modality=self.modality, damping=self.damping, damping_of=self.damping_of)
