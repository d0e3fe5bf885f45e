"""Held-out losses, and races between them: a step that is clearly worse on a part of the samples is asked about no more.

Most steps that lose do so by far more than samples differ, and a loss on all of them is what a trial takes longest for
(Maron and Moore, Hoeffding Races, 1994; here with Student's t of paired differences, docs/method.md, eq. (race)).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from scipy.special import stdtr
from torch import Tensor

_LEAST = 3  # samples whose spread says anything


@dataclass(frozen=True)
class HeldoutLoss:
    """What a model loses on held-out samples."""

    mean: float
    """Nats an answer token, over all of them; estimated for a step that was given up."""
    batches: Mapping[int, Float[Tensor, "samples 2"]] = field(default_factory=dict)
    """By the number of the batch, float64: each sample's loss summed over its answer tokens, and how many these are."""

    @property
    def num_samples(self) -> int:
        """How many samples were asked."""
        return sum(map(len, self.batches.values()))

    def is_less_than(self, other: "HeldoutLoss") -> bool:
        """One that is no number counts as infinite."""
        return math.isfinite(self.mean) and (not math.isfinite(other.mean) or self.mean < other.mean)


NOT_ASKED = HeldoutLoss(math.nan)


def heats(number: int) -> list[range]:
    """Batches that are asked before it is looked whether to go on: every fourth, what makes these every second, and the rest.

    They are told by their numbers alone, so that one and several processes come to the same. The last of them completes the
    `number` batches; empty ones are left out.
    """
    parts = [range(0, number, 4), range(2, number, 4), range(1, number, 2)]
    return [part for part in parts if part]


def difference(own: Mapping[int, Tensor], rival: Mapping[int, Tensor]) -> tuple[float, float]:
    """How much more is lost than by the rival, in nats an answer token of the samples in `own`, and the one-sided p-value of
    that by Student's t: the chance of so much or more where both lose alike.

    The samples are taken for the independent ones (which questions about one image are not quite), not their tokens: the error
    is that of a ratio of sums. The p-value is NaN for fewer than three samples, and where a loss is not finite.
    """
    mine, theirs = (torch.cat([of[number] for number in own]) for of in (own, rival))
    more, tokens = mine[:, 0] - theirs[:, 0], mine[:, 1]
    mean, number = float(more.sum() / tokens.sum()), len(more)
    if number < _LEAST or not math.isfinite(mean):
        return mean, math.nan
    rest = more - mean * tokens
    error = math.sqrt(number / (number - 1) * float(rest.square().sum())) / float(tokens.sum())
    if error == 0:
        return mean, 1.0 if mean <= 0 else 0.0
    return mean, float(stdtr(number - 1, -mean / error))


@dataclass(frozen=True)
class Race:
    """What a step has to beat."""

    rival: HeldoutLoss
    """The least loss so far, on all samples."""
    level: float
    """The p-value below which a step is given up, in (0, 1)."""

    def given_up(self, own: Mapping[int, Tensor]) -> HeldoutLoss | None:
        """The estimate of a loss that is worse on the samples that were asked: the rival's, and the difference on these. None
        where it has to be asked on."""
        mean, p = difference(own, self.rival.batches)
        return HeldoutLoss(self.rival.mean + mean, dict(own)) if mean > 0 and p < self.level else None


def by_sample(losses: Float[Tensor, "answers"], sizes: Sequence[int]) -> Float[Tensor, "samples 2"]:
    """A batch's losses, token by token, as `HeldoutLoss.batches` has them; `sizes` are the answer tokens of each sample."""
    sums = torch.stack([own.double().sum() for own in losses.split(list(sizes))]).cpu()
    return torch.stack([sums, torch.tensor(sizes, dtype=torch.float64)], 1)
