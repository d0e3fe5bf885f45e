"""What the scores share: energies, the choice of modality, curvature of a layer and of one channel in it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.errors import UserError
from mgvq.types import MODALITIES, Kronecker, Modality, Needs, Site, SiteStats, StatsBank

Choice = Literal["both", "image", "text"]


@dataclass(frozen=True, kw_only=True)
class LayerScore(ABC):
    """A score that is computed from the weight and the statistics of one layer at a time.

    `modality`: the tokens whose statistics count. A layer that has none of the chosen modality (vision tower and projector see
    image tokens only) is scored on those it has; one that saw no token at all, or only zeros, scores 0.
    """

    modality: str  # both | image | text
    needs: ClassVar[Needs] = Needs(gram=True)

    def __post_init__(self) -> None:
        if self.modality not in get_args(Choice):
            raise UserError(f"sensitivity.modality must be one of {', '.join(get_args(Choice))}; got {self.modality!r}")

    @property
    def needs_images(self) -> bool:
        return self.modality == "image"

    def __call__(self, weights: Mapping[Site, Float[Tensor, "_ _"]], bank: StatsBank) -> Mapping[Site, Float[Tensor, "_"]]:
        return {site: as_score(self.score(weight, bank[site])) for site, weight in weights.items()}

    @abstractmethod
    def score(self, weight: Float[Tensor, "out in"], stats: SiteStats) -> Float[Tensor, "in"]:
        """In float64, on the weight's device."""


def check_damping(damping: float) -> None:
    """Raises UserError for a damping that could leave a singular matrix as it is."""
    if not 0 < damping <= 1:
        raise UserError(f"sensitivity.damping must be > 0 and at most 1 (a share of the mean diagonal), got {damping!r}")


def as_score(values: Float[Tensor, "in"]) -> Float[Tensor, "in"]:
    """Float32 on the CPU; what rounding pushed below 0 is 0."""
    return values.clamp(min=0).float().cpu()


def column_energy(weight: Float[Tensor, "out in"]) -> Float[Tensor, "in"]:
    """`||W_:c||^2` in float64."""
    return weight.double().square().sum(0)


def geometric_mean(scores: Iterable[Float[Tensor, "_"]]) -> float:
    """Of all positive entries; 1 where there is none, so that dividing by it leaves zeros alone."""
    values = torch.cat([s.double().flatten() for s in scores])
    positive = values[values > 0]
    return positive.log().mean().exp().item() if len(positive) else 1.0


def selected(stats: SiteStats, modality: str) -> tuple[Modality, ...]:
    """The chosen modality if the layer has tokens of it, else all it has tokens of (`both`: always all)."""
    present: tuple[Modality, ...] = tuple(m for m in MODALITIES if stats.num_tokens.get(m, 0) > 0)
    chosen: tuple[Modality, ...] = tuple(m for m in present if m == modality)
    return chosen or present


def second_moment(weight: Float[Tensor, "out in"], stats: SiteStats, modality: str) -> Float[Tensor, "in in"]:
    """`A = E[x x^T]` over the selected tokens, in float64; zero without any."""
    names = selected(stats, modality)
    total = weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    for name in names:
        total += stats.gram[name].to(total)
    return total / max(1, sum(stats.num_tokens[name] for name in names))


def channel_power(weight: Float[Tensor, "out in"], stats: SiteStats, modality: str) -> Float[Tensor, "in"]:
    """`A_cc = E[x_c^2]`: the diagonal of `second_moment`, without the cost of the rest."""
    names = selected(stats, modality)
    total = weight.new_zeros(weight.shape[1], dtype=torch.float64)
    for name in names:
        total += stats.gram[name].diagonal().to(total)
    return total / max(1, sum(stats.num_tokens[name] for name in names))


def damped(matrix: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """`matrix + damping * mean diagonal * I`; positive definite for a positive semidefinite matrix that is not zero."""
    return matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def fisher_blocks(
    weight: Float[Tensor, "out in"], stats: SiteStats, modality: str
) -> list[tuple[Float[Tensor, "in"], Float[Tensor, "out out"]]]:
    """Pairs (p, B), one a selected modality, in float64: channel c's block of the Fisher of the mean answer loss is `sum p_c B`.

    Let N be the number of answers and g the gradient of their summed cross-entropy. Labels sampled from the model make the
    gradients of different answers uncorrelated, so the Fisher of the *mean* loss is `E[vec(G) vec(G)^T] / N` with `G = sum_t
    g_t x_t^T`. Tokens taken as independent leave `sum_t (g_t g_t^T) (x) (x_t x_t^T) / N`. Gradients and inputs taken as
    independent within a modality of n tokens leave `sum fisher (x) gram / (n N)` over the modalities (method 2.9, 3.3), so `p =
    diag(gram) / (n N)`, `B = fisher`.
    """
    blocks = []
    for name in selected(stats, modality):
        fisher = stats.fisher[name].to(weight.device, torch.float64)
        scale = stats.num_tokens[name] * max(1, stats.num_answers)
        blocks.append((stats.gram[name].diagonal().to(fisher) / scale, fisher))
    return blocks


def nearest_kronecker(weight: Float[Tensor, "out in"], stats: SiteStats, modality: str) -> Kronecker | None:
    """The one pair nearest to the sum that `fisher_blocks` describes, in float64; None where that is zero.

    Three rounds of power iteration from `h_out = I` (method 3.3); exact at once where one modality is selected.
    """
    names = selected(stats, modality)
    fishers = [stats.fisher[name].to(weight.device, torch.float64) / max(1, stats.num_answers) for name in names]
    grams = [stats.gram[name].to(weight.device, torch.float64) / stats.num_tokens[name] for name in names]
    if not any(gram.trace() > 0 and fisher.trace() > 0 for gram, fisher in zip(grams, fishers, strict=True)):
        return None
    h_in, h_out = grams[0], torch.eye(weight.shape[0], dtype=torch.float64, device=weight.device)
    for _ in range(3):
        h_in = _nearest(grams, fishers, h_out)
        h_out = _nearest(fishers, grams, h_in)
    return Kronecker(h_in, h_out)


def _nearest(
    ours: Sequence[Float[Tensor, "n n"]], theirs: Sequence[Float[Tensor, "m m"]], factor: Float[Tensor, "m m"]
) -> Float[Tensor, "n n"]:
    """The X that brings X (x) factor nearest to the sum of ours (x) theirs."""
    total = torch.zeros_like(ours[0])
    for mine, other in zip(ours, theirs, strict=True):
        total += (other * factor).sum() * mine
    return total / factor.square().sum()
