"""From the statistics of two modalities to one Gram or one Kronecker pair."""

import math
import statistics
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.errors import UserError
from mgvq.linalg import second_moment
from mgvq.types import MODALITIES, Kronecker, Modality, Site, SiteStats, StatsBank

Weights = Mapping[Modality, float]


def check_clip(clip: float | None) -> None:
    """Raises UserError unless `curvature.clip` is None or a finite number > 0."""
    if clip is not None and not (type(clip) in (int, float) and clip > 0 and math.isfinite(clip)):
        raise UserError(
            f"curvature.clip must be a number > 0, a multiple of the median energy of a batch's tokens, or null; got {clip!r}"
        )


def pooled(stats: SiteStats, weights: Weights) -> Float[Tensor, "in in"]:
    """The weighted mean of x x^T over all tokens: `sum_mu w_mu gram_mu / sum_mu w_mu num_tokens_mu`; zeros without tokens."""
    return second_moment([weights[m] * stats.gram[m] for m in MODALITIES], [weights[m] * stats.num_tokens[m] for m in MODALITIES])


def per_answer(stats: SiteStats) -> Float[Tensor, "k in in"]:
    """The Grams that are weighted by gradients, in nats of the mean answer loss."""
    assert stats.channel_gram is not None
    return stats.channel_gram / max(1, stats.num_answers)


def equal_weights(bank: StatsBank) -> dict[Site, Weights]:
    """Weights by which every token counts the same."""
    return {site: {"image": 1.0, "text": 1.0} for site in bank}


def mbq_weights(bank: StatsBank, power: int = 1) -> dict[Site, Weights]:
    """Weights by which an image token counts r^power times a text token (MBQ, Li et al. 2025; docs/method.md, eq. (mbq)).

    MBQ's loss is absolute, `r |dy|` of an image token: its square is that with r^2.

    r is the larger of the layer's own ratio and the median ratio over all layers. The ratio of a layer is the mean |g| of its
    image tokens over that of its text tokens, g the gradient of the answer loss. The median keeps images from vanishing, and it
    stands in where no text token has a gradient; r is 1 where no layer has a ratio. Both modalities have the weight 1 in layers
    that see only one of them.
    """
    both = {site: stats for site, stats in bank.items() if all(stats.num_tokens[m] for m in MODALITIES)}
    means = {site: [stats.saliency.get(m) for m in MODALITIES] for site, stats in both.items()}
    ratios = {site: image / text for site, (image, text) in means.items() if image is not None and text}
    floor = statistics.median(ratios.values()) if ratios else 1.0
    larger = {site: max(ratios.get(site, floor), floor) ** power for site in both}
    return {site: {"image": larger.get(site, 1.0), "text": 1.0} for site in bank}


def balanced(h_in: Float[Tensor, "in in"], h_out: Float[Tensor, "out out"]) -> Kronecker:
    """The same product in float32 with a mean diagonal of 1 in `h_out`, so that `h_in` alone carries the unit (nats).

    Where there is no curvature `h_in` becomes zero and `h_out` the identity.
    """
    mean = h_out.diagonal().double().mean()
    if not mean > 0:
        return Kronecker(torch.zeros_like(h_in), torch.eye(len(h_out)))
    return Kronecker(h_in.to(torch.float64, copy=True).mul_(mean).float(), h_out.to(torch.float64, copy=True).div_(mean).float())
