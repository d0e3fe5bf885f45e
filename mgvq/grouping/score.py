"""Groups by sensitivity: channels sorted by score and cut into equal groups (RSAVQ, Algorithm 1)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from mgvq.grouping.cut import by_reader, check_num_groups, ranked_groups
from mgvq.types import Needs, Site, StatsBank


@dataclass(frozen=True, kw_only=True)
class Score:
    """Group 0 holds the least sensitive channels. The scores of layers that read the same activations are added up."""

    num_groups: int
    """The number of groups in a layer, 2 to 16."""
    needs: ClassVar[Needs] = Needs()
    uses_score: ClassVar[bool] = True
    needs_images: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_num_groups(self.num_groups)

    def __call__(self, scores: Mapping[Site, Float[Tensor, "_"]], bank: StatsBank) -> Mapping[Site, Int[Tensor, "_"]]:
        groups = {reader: ranked_groups(total, self.num_groups) for reader, total in by_reader(scores).items()}
        return {site: groups[site.reads] for site in scores}
