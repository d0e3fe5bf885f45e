"""The second moment of the inputs, which is the Hessian of GPTQ."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mgvq.curvature.fusion import check_clip, equal_weights, mbq_weights, pooled
from mgvq.errors import UserError
from mgvq.model.lazy import Lazy
from mgvq.types import Metric, Needs, Site, StatsBank

_POWERS = {"mbq_ratio": 1, "mbq_squared": 2}  # of r, by which an image token counts


@dataclass(frozen=True, kw_only=True)
class Input:
    """`h_in = E[x x^T]` over the tokens, without `h_out`: all output channels count the same (GPTQ, Frantar et al. 2023).

    See docs/method.md, eq. (gram), and eq. (clip) for tokens that are weighed down.
    """

    fusion: str
    """`none`: every token counts the same; `mbq_ratio`: image tokens are weighted by their gradients (`fusion.mbq_weights`), by
    their ratio r as it is; `mbq_squared`: by r^2, the weight under which squared errors rank as MBQ's absolute ones do."""
    clip: float | None = None
    """A token x counts `min(1, clip * m / |x|^2)` times in the Gram, m the median of |x|^2 over the tokens of its modality in its
    batch; None: every token counts once. Sensitivities, groupings and outliers of the run read the same Gram."""
    has_output_factor: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_clip(self.clip)
        if self.fusion not in ("none", *_POWERS):
            raise UserError(f"curvature.fusion must be none, mbq_ratio or mbq_squared with curvature=input, got {self.fusion!r}")

    @property
    def needs(self) -> Needs:
        return Needs(gram=True, clip=self.clip, saliency=self.fusion in _POWERS)

    @property
    def needs_images(self) -> bool:
        return self.fusion in _POWERS

    def fuse(self, bank: StatsBank) -> Mapping[Site, Metric]:
        weights = mbq_weights(bank, _POWERS[self.fusion]) if self.fusion in _POWERS else equal_weights(bank)
        return Lazy(bank, lambda site: Metric((pooled(bank[site], weights[site]),)))
