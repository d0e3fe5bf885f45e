"""From the statistics of two modalities to one Gram, or one Kronecker pair."""

import statistics
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.types import MODALITIES, Kronecker, Modality, Site, SiteStats, StatsBank

Weights = Mapping[Modality, float]


def pooled(stats: SiteStats, weights: Weights) -> Float[Tensor, "in in"]:
    """The weighted mean of x x^T over all tokens: `sum_mu w_mu gram_mu / sum_mu w_mu num_tokens_mu`; zeros without tokens."""
    total = torch.stack([weights[m] * stats.gram[m] for m in MODALITIES]).sum(0)
    return total / (sum(weights[m] * stats.num_tokens[m] for m in MODALITIES) or 1.0)


def per_answer(stats: SiteStats) -> Float[Tensor, "k in in"]:
    """The Grams weighted by gradients, in nats of the mean answer loss."""
    assert stats.channel_gram is not None
    return stats.channel_gram / max(1, stats.num_answers)


def equal_weights(bank: StatsBank) -> dict[Site, Weights]:
    """Every token counts the same."""
    return {site: {"image": 1.0, "text": 1.0} for site in bank}


def mbq_weights(bank: StatsBank) -> dict[Site, Weights]:
    """An image token counts r times a text token: `r = max(r_layer, median over layers)` (method: MBQ, Li et al. 2025).

    `r_layer` is the mean |g| of the layer's image tokens over that of its text tokens, g the gradient of the answer loss. The
    median keeps images from vanishing, and stands in where no text token has a gradient; without any ratio it is 1. Layers that
    see one modality have the weights 1.
    """
    both = {site: stats for site, stats in bank.items() if all(stats.num_tokens[m] for m in MODALITIES)}
    means = {site: [stats.saliency[m] / stats.num_tokens[m] for m in MODALITIES] for site, stats in both.items()}
    ratios = {site: image / text for site, (image, text) in means.items() if text}
    floor = statistics.median(ratios.values()) if ratios else 1.0
    return {site: {"image": max(ratios.get(site, floor), floor) if site in both else 1.0, "text": 1.0} for site in bank}


def balanced(h_in: Float[Tensor, "in in"], h_out: Float[Tensor, "out out"]) -> Kronecker:
    """The same product with a mean diagonal of 1 in `h_out`, so that `h_in` alone has the unit (nats).

    Where there is no curvature `h_in` is zero and `h_out` the identity.
    """
    mean = h_out.diagonal().double().mean()
    if not mean > 0:
        return Kronecker(torch.zeros_like(h_in), torch.eye(len(h_out)))
    return Kronecker((h_in.double() * mean).float(), (h_out.double() / mean).float())


def nearest(terms: Sequence[tuple[Float[Tensor, "in in"], Float[Tensor, "out out"]]], rounds: int) -> Kronecker:
    """The `h_out (x) h_in` nearest (Frobenius) to `sum_mu B_mu (x) A_mu` of the terms (A_mu, B_mu) (Van Loan & Pitsianis 1993).

    A power iteration from h_out = I: h_in <- sum_mu <B_mu, h_out> A_mu / |h_out|^2, h_out <- sum_mu <A_mu, h_in> B_mu / |h_in|^2.
    Both factors are combinations of the terms, so the combinations alone are iterated, on the terms' inner products.
    """
    inputs, outputs = ([t.double() for t in factors] for factors in zip(*terms, strict=True))
    inner_in, inner_out = _inner_products(inputs), _inner_products(outputs)
    share = torch.stack([b.trace() / len(b) for b in outputs])  # the first half-step: h_in, as shares of the A_mu
    for _ in range(rounds - 1):
        share = _half_step(inner_out, _half_step(inner_in, share))
    return balanced(_combined(share, inputs), _combined(_half_step(inner_in, share), outputs))


def _inner_products(matrices: Sequence[Tensor]) -> Float[Tensor, "mu mu"]:
    return torch.stack([torch.stack([(a * b).sum() for b in matrices]) for a in matrices])


def _half_step(inner: Float[Tensor, "mu mu"], share: Float[Tensor, "mu"]) -> Float[Tensor, "mu"]:
    """Of the one factor's shares, the other's: `<., sum_nu share_nu . > / |sum_nu share_nu .|^2`; zeros for no curvature."""
    products = inner @ share
    norm = share @ products
    return products / norm if norm > 0 else torch.zeros_like(share)


def _combined(share: Float[Tensor, "mu"], matrices: Sequence[Float[Tensor, "c c"]]) -> Float[Tensor, "c c"]:
    return torch.stack([s * m for s, m in zip(share, matrices, strict=True)]).sum(0).float()
