"""What is known of a quantisation before anything is collected: whether its budget can be met, and layers that are odd."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.formats.outliers import Outliers
from mgvq.protocols import LayerTransform
from mgvq.quantization.codebooks import CodebookCache, rate_table
from mgvq.quantization.method import Method
from mgvq.quantization.storage import group_ids, held_bits, held_by
from mgvq.quantization.table_groups import cut_table_groups
from mgvq.types import LayerProblem, Site

_UNUSED = 0.02  # the share of the budget that may stay unused without a word


def predicted_bits(
    method: Method, sites: Sequence[Site], bits_per_weight: float, scores: Mapping[Site, Float[Tensor, "_"]] | None = None
) -> float | None:
    """The stored bits a weight that the method comes to, from the shapes of the layers alone.

    Which rate a table group gets depends on its score (all alike where there are none yet), whether the budget can be met does
    not: raises the allocation's UserError where it cannot. None where the sizes of the channel groups depend on statistics.
    """
    if method.grouping.needs:
        return None
    scores = scores or {site: torch.ones(site.in_features) for site in sites}
    groups = method.grouping(scores, {})
    transform, transforms = method.transform, {}
    if transform:
        transforms = transform(sites, groups if transform.within == "group" else None)
    problems = {site: without_weights(site, scores[site], groups[site], transforms.get(site)) for site in sites}
    beside = held_bits(held_by(problems, group_ids(problems)))
    beside += sum(Outliers.storage_bits((s.out_features, s.in_features), min(method.outliers, s.num_weights)) for s in sites)
    table_groups = cut_table_groups(problems, method.codebook)
    modelled = "gaussian" if method.allocation.distortion else None  # nothing is fitted here
    table = rate_table(CodebookCache(table_groups, method.codebook, problems), modelled)
    num_weights = sum(s.num_weights for s in sites)
    chosen = method.allocation(table, int(bits_per_weight * num_weights) - beside)
    return (beside + int(table.bits[torch.arange(len(table_groups)), chosen].sum())) / num_weights


def without_weights(
    site: Site,
    score: Float[Tensor, "in"],
    groups: Int[Tensor, "in"],
    transform: LayerTransform | None = None,
    outliers: Outliers | None = None,
) -> LayerProblem:
    """A layer's problem in outline: what decides on groups, rates and bits, without its numbers."""
    shape = torch.zeros(()).expand(site.out_features, site.in_features)  # takes no memory
    return LayerProblem(
        site=site, weight=shape, target=shape, metric=None, score=score, groups=groups, transform=transform, outliers=outliers
    )


def unused_budget(stored_bits: int, budget_bits: int) -> list[str]:
    """The flag `unused_budget:<share>` where more than 2 % of the budget is not used: the codebook has no rate near it."""
    unused = 1 - stored_bits / budget_bits
    return [f"unused_budget:{unused:.3f}"] if unused > _UNUSED else []


def constant_layers(weights: Mapping[Site, Float[Tensor, "_ _"]]) -> list[str]:
    """The flag `constant:<site>` for every layer of which all weights, or those of a row or a column, are one value.

    Such a layer is as a rule damaged or was never trained. Rows and columns of a single weight do not count.
    """
    flags = []
    for site, weight in weights.items():
        rows = weight.shape[1] > 1 and bool((weight == weight[:, :1]).all(1).any())
        columns = weight.shape[0] > 1 and bool((weight == weight[:1]).all(0).any())
        if rows or columns:
            flags.append(f"constant:{site.name}")
    return flags
