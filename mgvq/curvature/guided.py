"""GuidedQuant's metric: one Gram for each group of output channels, weighted by the gradients of the channels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mgvq.curvature.fusion import per_answer
from mgvq.errors import UserError
from mgvq.model.lazy import Lazy
from mgvq.types import Metric, Needs, Site, StatsBank


@dataclass(frozen=True, kw_only=True)
class Guided:
    """`h_in[k] = sum_t (mean of g_tj^2 over the output channels j of group k) x_t x_t^T / N` for N answer tokens, no `h_out`.

    This is the empirical Fisher of the answer loss without its terms across output channels, averaged within each group
    (GuidedQuant, Kim et al. 2025; docs/method.md, eq. (guided)). Its unit is nats of the mean answer loss.
    """

    num_groups: int
    """Groups of consecutive output channels; a layer with fewer channels has fewer groups."""
    has_output_factor: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (isinstance(self.num_groups, int) and self.num_groups >= 1):
            raise UserError(f"curvature.num_groups must be a whole number >= 1, got {self.num_groups!r}")

    @property
    def needs(self) -> Needs:
        return Needs(channel_groups=self.num_groups)

    def fuse(self, bank: StatsBank) -> Mapping[Site, Metric]:
        return Lazy(bank, lambda site: Metric(tuple(per_answer(bank[site]))))
