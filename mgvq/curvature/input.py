"""The second moment of the inputs, the Hessian of GPTQ."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mgvq.curvature.fusion import equal_weights, mbq_weights, pooled
from mgvq.errors import UserError
from mgvq.types import Metric, Needs, Site, StatsBank


@dataclass(frozen=True, kw_only=True)
class Input:
    """`h_in = E[x x^T]` over the tokens, no `h_out`: all output channels count the same (method: GPTQ, Frantar et al. 2023).

    `fusion` is `none`, every token alike, or `mbq_ratio`, image tokens weighted by their gradients (`fusion.mbq_weights`).
    """

    fusion: str  # none | mbq_ratio
    has_output_factor: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.fusion not in ("none", "mbq_ratio"):
            raise UserError(f"curvature.fusion must be none or mbq_ratio with curvature=input, got {self.fusion!r}")

    @property
    def needs(self) -> Needs:
        return Needs(gram=True, gradients=self.fusion == "mbq_ratio")

    @property
    def needs_images(self) -> bool:
        return self.fusion == "mbq_ratio"

    def fuse(self, bank: StatsBank) -> Mapping[Site, Metric]:
        weights = mbq_weights(bank) if self.fusion == "mbq_ratio" else equal_weights(bank)
        return {site: Metric((pooled(stats, weights[site]),)) for site, stats in bank.items()}
