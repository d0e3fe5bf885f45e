"""Groups by which modality dominates a channel: the paper's claim that one codebook cannot fit the channels of both."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.grouping.cut import check_num_groups, ranked_groups
from mgvq.types import Needs, Site, SiteStats, StatsBank


@dataclass(frozen=True, kw_only=True)
class Modality:
    """Sorts channels by the share of images in their power, `E_image x^2 / (E_image x^2 + E_text x^2)`, and cuts equal groups.

    Group 0 is the most textual. A layer that sees one modality only is one group. This is a reconstruction: the paper's rule is
    not public.
    """

    num_groups: int
    """The number of groups in a layer, 2 to 16."""
    needs: ClassVar[Needs] = Needs(gram=True)
    uses_score: ClassVar[bool] = False
    needs_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_num_groups(self.num_groups)

    def __call__(self, scores: Mapping[Site, Float[Tensor, "_"]], bank: StatsBank) -> Mapping[Site, Int[Tensor, "_"]]:
        groups: dict[str, Tensor] = {}
        for site in scores:
            if site.reads not in groups:
                share = image_share(bank[site])
                whole = torch.zeros(site.in_features, dtype=torch.int32)
                groups[site.reads] = whole if share is None else ranked_groups(share, self.num_groups)
        return {site: groups[site.reads] for site in scores}


def image_share(stats: SiteStats) -> Float[Tensor, "_"] | None:
    """The share of images in the power of every input channel, in [0, 1], .5 for a dead one; None where a modality is missing."""
    if not all(stats.num_tokens.get(m, 0) for m in ("image", "text")):
        return None
    image, text = (stats.gram[m].diagonal().double().cpu().clamp(min=0) / stats.num_tokens[m] for m in ("image", "text"))
    total = image + text
    return torch.where(total > 0, image / total.clamp(min=1e-300), 0.5)
