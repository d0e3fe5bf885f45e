"""What groupings share: values added up over the layers that read a channel, and the ranking cut into equal groups."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.errors import UserError
from mgvq.types import Site

MAX_GROUPS = 16


def check_num_groups(num_groups: int) -> None:
    """Raises UserError for what is no number of groups, and for 1: that is grouping=one."""
    if not (isinstance(num_groups, int) and 2 <= num_groups <= MAX_GROUPS):
        raise UserError(
            f"grouping.num_groups must be a whole number of 2 to {MAX_GROUPS}, got {num_groups!r}; for one: grouping=one"
        )


def by_reader(values: Mapping[Site, Float[Tensor, "_"]]) -> dict[str, Float[Tensor, "_"]]:
    """Add up the values of the layers that read the same activations, in float64; the keys are `Site.reads`."""
    sums: dict[str, Tensor] = {}
    for site, value in values.items():
        wide = value.detach().double().cpu()
        sums[site.reads] = sums[site.reads] + wide if site.reads in sums else wide
    return sums


def ranked_groups(values: Float[Tensor, "c"], num_groups: int) -> Int[Tensor, "c"]:
    """Cut groups of equal size (to one channel) by ascending value, 0 the lowest; equal values keep the order of the channels.

    Fewer channels than groups make as many groups as channels.
    """
    number = min(num_groups, len(values))
    group = torch.empty(len(values), dtype=torch.int32)
    group[torch.argsort(values, stable=True)] = (torch.arange(len(values)) * number // len(values)).to(torch.int32)
    return group
