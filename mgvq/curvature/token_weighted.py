"""VLMQ's metric: the second moment of the inputs, each token weighted by its gradient."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mgvq.curvature.fusion import per_answer
from mgvq.model.lazy import Lazy
from mgvq.types import Metric, Needs, Site, StatsBank


@dataclass(frozen=True, kw_only=True)
class TokenWeighted:
    """`h_in = sum_t w_t x_t x_t^T` with `w_t = |g_t|^2 / (out N)`, g the gradient of the answer loss over N answer tokens.

    In VLMQ (Xue et al. 2025) a token is as important as its gradient. The squared norm makes the metric the empirical Fisher with
    one factor for all output channels: GuidedQuant with one group (docs/method.md, eq. (guided)). Weights of mean 1 would give
    the same metric up to a factor; these give it in nats of the mean answer loss.
    """

    has_output_factor: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False

    @property
    def needs(self) -> Needs:
        return Needs(channel_groups=1)

    def fuse(self, bank: StatsBank) -> Mapping[Site, Metric]:
        return Lazy(bank, lambda site: Metric(tuple(per_answer(bank[site]))))
