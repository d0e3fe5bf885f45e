"""What the scores share: norms, the choice of modality, and the curvature of a layer and of one channel in it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq import linalg
from mgvq.errors import UserError
from mgvq.progress import progress
from mgvq.types import MODALITIES, Kronecker, Modality, Needs, Site, SiteStats, StatsBank

Choice = Literal["both", "image", "text"]


@dataclass(frozen=True, kw_only=True)
class LayerScore(ABC):
    """A score that is computed from the weight and the statistics of one layer at a time.

    A layer that saw no token at all, or only zeros, scores 0.
    """

    modality: str
    """`both`, `image` or `text`: the tokens whose statistics count. A layer that has seen none of the chosen modality (vision
    tower and projector see image tokens only) is scored on those it has seen."""
    needs: ClassVar[Needs] = Needs(gram=True)

    def __post_init__(self) -> None:
        if self.modality not in get_args(Choice):
            raise UserError(f"sensitivity.modality must be one of {', '.join(get_args(Choice))}; got {self.modality!r}")

    @property
    def needs_images(self) -> bool:
        return self.modality == "image"

    def __call__(self, weights: Mapping[Site, Float[Tensor, "_ _"]], bank: StatsBank) -> Mapping[Site, Float[Tensor, "_"]]:
        return {site: as_score(score) for site, score in self.scores(weights, bank).items()}

    def scores(self, weights: Mapping[Site, Float[Tensor, "_ _"]], bank: StatsBank) -> dict[Site, Float[Tensor, "_"]]:
        """The scores of all layers' channels as `score` gives them."""
        return {site: self.score(weight, bank[site]) for site, weight in progress(weights.items(), "layers of scores")}

    @abstractmethod
    def score(self, weight: Float[Tensor, "out in"], stats: SiteStats) -> Float[Tensor, "in"]:
        """Return the scores of one layer's channels, in float64 on the weight's device."""


def check_damping(damping: float, of: str = "mean") -> None:
    """Raises UserError for a damping that could leave a singular matrix as it is, and a word that does not say of what."""
    if not 0 < damping <= 1:
        raise UserError(f"sensitivity.damping must be > 0 and at most 1 (a share of the diagonal), got {damping!r}")
    if of not in linalg.DAMPING_OF:
        raise UserError(f"sensitivity.damping_of must be one of {', '.join(linalg.DAMPING_OF)}; got {of!r}")


def as_score(values: Float[Tensor, "in"]) -> Float[Tensor, "in"]:
    """Bring scores to float32 on the CPU; what rounding errors pushed below 0 becomes 0."""
    return values.clamp(min=0).float().cpu()


def column_norms(weight: Float[Tensor, "out in"]) -> Float[Tensor, "in"]:
    """The squared norm of every column, `||W_:c||^2`, in float64."""
    return weight.double().square().sum(0)


def geometric_mean(scores: Iterable[Float[Tensor, "_"]]) -> float:
    """The geometric mean of all positive entries; 1 where there is none, so that dividing by it leaves zeros alone."""
    values = torch.cat([s.double().flatten() for s in scores])
    positive = values[values > 0]
    return positive.log().mean().exp().item() if len(positive) else 1.0


def selected(stats: SiteStats, modality: str) -> tuple[Modality, ...]:
    """The chosen modality if the layer has seen tokens of it, else every modality that it has seen (`both`: always these)."""
    present: tuple[Modality, ...] = tuple(m for m in MODALITIES if stats.num_tokens.get(m, 0) > 0)
    chosen: tuple[Modality, ...] = tuple(m for m in present if m == modality)
    return chosen or present


def second_moment(weight: Float[Tensor, "out in"], stats: SiteStats, modality: str) -> Float[Tensor, "in in"]:
    """`A = E[x x^T]` over the selected tokens, in float64; zero without any (docs/method.md, eq. (gram))."""
    names = selected(stats, modality) or MODALITIES
    return linalg.second_moment([_wide(stats.gram[m], weight) for m in names], [stats.num_tokens[m] for m in names])


def channel_power(weight: Float[Tensor, "out in"], stats: SiteStats, modality: str) -> Float[Tensor, "in"]:
    """`A_cc = E[x_c^2]`: the diagonal of `second_moment`, without the cost of the rest."""
    names = selected(stats, modality) or MODALITIES
    return linalg.second_moment([_wide(stats.gram[m].diagonal(), weight) for m in names], [stats.num_tokens[m] for m in names])


def _wide(values: Float[Tensor, "..."], like: Tensor) -> Float[Tensor, "..."]:
    return values.to(like.device, torch.float64)


def fisher_blocks(
    weight: Float[Tensor, "out in"], stats: SiteStats, modality: str
) -> list[tuple[Float[Tensor, "in"], Float[Tensor, "out out"]]]:
    """Return a pair (p, B) for each selected modality, in float64; channel c's block of the Fisher is `sum p_c B`.

    Let N be the number of answers and g the gradient of their summed cross-entropy. Labels sampled from the model make the
    gradients of different answers uncorrelated, so the Fisher of the *mean* loss is `E[vec(G) vec(G)^T] / N` with `G = sum_t
    g_t x_t^T`. Tokens taken as independent leave `sum_t (g_t g_t^T) (x) (x_t x_t^T) / N`. Gradients and inputs taken as
    independent within a modality of n tokens leave `sum fisher (x) gram / (n N)` over the modalities, so that `p =
    diag(gram) / (n N)` and `B = fisher` (docs/method.md, eq. (fisher)).
    """
    blocks = []
    for name in selected(stats, modality):
        fisher = _wide(stats.fisher[name], weight)
        scale = stats.num_tokens[name] * max(1, stats.num_answers)
        blocks.append((stats.gram[name].diagonal().to(fisher) / scale, fisher))
    return blocks


def nearest_kronecker(weight: Float[Tensor, "out in"], stats: SiteStats, modality: str) -> Kronecker | None:
    """The one pair nearest to the sum that `fisher_blocks` describes, in float64; None where that sum is zero.

    Three rounds of `linalg.nearest_kronecker`, of which the first is exact where one modality is selected.
    """
    terms = [
        (_wide(stats.gram[m], weight) / stats.num_tokens[m], _wide(stats.fisher[m], weight) / max(1, stats.num_answers))
        for m in selected(stats, modality)
    ]
    if not any(gram.trace() > 0 and fisher.trace() > 0 for gram, fisher in terms):
        return None
    return Kronecker(*linalg.nearest_kronecker(terms, 3))
