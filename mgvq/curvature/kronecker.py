"""The Fisher of the mean answer loss as a Kronecker product of an output and an input factor."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from mgvq.curvature.fusion import Weights, balanced, check_clip, equal_weights, mbq_weights, pooled
from mgvq.errors import UserError
from mgvq.linalg import DiagonalPlusLowRank, nearest_kronecker
from mgvq.model.lazy import Lazy
from mgvq.types import MODALITIES, Kronecker, Metric, Modality, Needs, Site, SiteStats, StatsBank

_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class KroneckerFisher:
    """`h_out (x) h_in` in nats of the mean answer loss, `h_out` with a mean diagonal of 1 (docs/method.md, eq. (kronecker)).

    The labels of the Fisher are sampled from the model. With tokens taken as independent (K-FAC, Martens & Grosse 2015) the
    Fisher is the sum over modalities of `fisher (x) gram / (num_tokens num_answers)`, and `fusion` makes one product of it:

        none        both modalities as one: their summed Fisher and their common second moment
        mbq_ratio   the same, with image tokens weighted in the second moment (`fusion.mbq_weights`)
        kron        the Kronecker product nearest to the sum (`linalg.nearest_kronecker`)
        token       the one nearest to the sum over all tokens, each with its own gradient (docs/method.md, eq. (sketch-a))
    """

    granularity: str
    """`token`: tokens are independent (K-FAC; YAQA's sketch A, Tseng et al. 2025); `sequence`: samples are, without regard to
    modalities (YAQA's sketch B and RSAVQ; docs/method.md, eq. (sketch-b)), so that `fusion` has to be `none`."""
    fusion: str
    """How the modalities become one product: `none`, `mbq_ratio`, `kron` or `token`."""
    rounds: int | None
    """Rounds of the power iteration of `kron` and `token` (there each takes two more passes over the data); None: 3, or none with
    the other fusions, which iterate nothing."""
    clip: float | None = None
    """A token x counts `min(1, clip * m / |x|^2)` times in the Gram, m the median of |x|^2 over the tokens of its modality in its
    batch (docs/method.md, eq. (clip)); None: every token counts once. Sensitivities, groupings and outliers of the run read the
    same Gram. Refused where no Gram is read: with sequences, and with `fusion=token`."""
    output_rank: int | None = None
    """The output factor is kept as its diagonal and this many directions, for layers with more than twice as many outputs
    (`linalg.DiagonalPlusLowRank`; docs/method.md, eq. (output-rank)), which saves memory and most of a refit; None: whole."""
    has_output_factor: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.granularity not in ("token", "sequence"):
            raise UserError(f"curvature.granularity must be token or sequence, got {self.granularity!r}")
        if self.fusion not in ("none", "mbq_ratio", "kron", "token"):
            raise UserError(f"curvature.fusion must be none, mbq_ratio, kron or token, got {self.fusion!r}")
        if self.granularity == "sequence" and self.fusion != "none":
            raise UserError(
                f"curvature.fusion={self.fusion} has no effect with curvature.granularity=sequence, which takes a sample's "
                "tokens of both modalities together: set curvature.fusion=none."
            )
        check_clip(self.clip)
        if self.clip is not None and not self.needs.gram:
            idle = "granularity=sequence" if self.granularity == "sequence" else "fusion=token"
            raise UserError(
                f"curvature.clip={self.clip} has no effect with curvature.{idle}, which weighs tokens by their gradients and has "
                "no Gram: set it to null."
            )
        if self.output_rank is not None and not (type(self.output_rank) is int and self.output_rank >= 1):
            raise UserError(
                f"curvature.output_rank must be a whole number >= 1, or null for the whole factor; got {self.output_rank!r}"
            )
        if self.rounds is None:
            return
        if self.fusion not in ("kron", "token"):
            raise UserError(
                f"curvature.rounds={self.rounds} has no effect with curvature.fusion={self.fusion}, which iterates nothing: "
                "set it to null."
            )
        if not (isinstance(self.rounds, int) and self.rounds >= 1):
            raise UserError(f"curvature.rounds must be a whole number >= 1 or null, got {self.rounds!r}")

    @property
    def needs(self) -> Needs:
        if self.granularity == "sequence":
            return Needs(sequences=True)
        if self.fusion == "token":
            return Needs(power_rounds=self.rounds or _ROUNDS)
        return Needs(gram=True, clip=self.clip, fisher=True, saliency=self.fusion == "mbq_ratio")

    @property
    def needs_images(self) -> bool:
        return self.fusion == "mbq_ratio"

    def fuse(self, bank: StatsBank) -> Mapping[Site, Metric]:
        weights = mbq_weights(bank) if self.fusion == "mbq_ratio" else equal_weights(bank)

        def metric(site: Site) -> Metric:
            pair = self._factors(bank[site], weights[site])
            if self.output_rank is None or 2 * self.output_rank >= len(pair.h_out):
                return Metric((pair.h_in,), pair.h_out)
            return Metric((pair.h_in,), DiagonalPlusLowRank.of(pair.h_out, self.output_rank))

        return Lazy(bank, metric)

    def _factors(self, stats: SiteStats, weights: Weights) -> Kronecker:
        if self.granularity == "sequence" or self.fusion == "token":
            pair = stats.sequence if self.granularity == "sequence" else stats.token
            assert pair is not None
            return pair
        answers = max(1, stats.num_answers)
        if self.fusion == "kron":
            # Of a modality without tokens the term is zero; in a wide layer every matrix that is there at a time counts.
            seen: list[Modality] = [m for m in MODALITIES if stats.num_tokens[m]] or [MODALITIES[0]]
            terms = [(stats.gram[m] / max(1, stats.num_tokens[m]), stats.fisher[m] / answers) for m in seen]
            wide = [*nearest_kronecker(terms, self.rounds or _ROUNDS)]
            del terms
            return balanced(wide.pop(0).float(), wide.pop(0).float())
        return balanced(pooled(stats, weights), torch.stack([stats.fisher[m] for m in MODALITIES]).sum(0) / answers)
