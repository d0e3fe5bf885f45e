"""Codebooks fitted to table groups, each once; and what every rate costs and loses on each of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.codebook.exponent import fit_in_range
from mgvq.formats.vector import to_vectors
from mgvq.model.lazy import Overlaid
from mgvq.protocols import Codebook, FittedCodebook
from mgvq.quantization.table_groups import TableGroup
from mgvq.types import ChannelSlice, LayerProblem, Rate, RateTable, Site


class CodebookCache:
    """The codebooks of all table groups at the rates that were asked for, each fitted once to the targets of `problems`."""

    def __init__(self, table_groups: Sequence[TableGroup], codebook: Codebook, problems: Mapping[Site, LayerProblem]) -> None:
        self.table_groups, self.codebook, self.problems = table_groups, codebook, problems
        self._fitted: dict[tuple[int, str], tuple[Sequence[FittedCodebook], list[str]]] = {}
        self._borrowed: dict[int, CodebookCache] = {}  # whose codebooks a table group takes, where it does not fit its own

    def __call__(self, number: int, rate: Rate) -> tuple[Sequence[FittedCodebook], list[str]]:
        """One codebook for each channel slice of a table group, and the flags of the fallbacks that its fit took."""
        if number in self._borrowed:
            return self._borrowed[number](number, rate)
        if (number, rate.name) not in self._fitted:
            table_group, flags = self.table_groups[number], []
            targets = [self.target(s) for s in table_group.slices]
            importances = [self._importance(s) for s in table_group.slices]
            codebooks = fit_in_range(self.codebook, table_group.info.name, targets, rate, importances, flags)
            self._fitted[number, rate.name] = codebooks, flags
        return self._fitted[number, rate.name]

    def with_targets(self, targets: Mapping[Site, Float[Tensor, "_ _"]], *, fit: bool = True) -> "CodebookCache":
        """The same layers with other targets for some of them; see `with_problems`."""
        return self.with_problems({s: replace(self.problems[s], target=target) for s, target in targets.items()}, fit=fit)

    def with_problems(self, problems: Mapping[Site, LayerProblem], *, fit: bool = True) -> "CodebookCache":
        """Other problems for some of the layers; codebooks are fitted to their targets.

        A table group in which other layers have slices too keeps the codebooks that it has here, and without `fit` all do.
        """
        moved = CodebookCache(self.table_groups, self.codebook, Overlaid(self.problems, problems))
        for number, table_group in enumerate(self.table_groups):
            if not fit or any(channel_slice.site not in problems for channel_slice in table_group.slices):
                moved._borrowed[number] = self._borrowed.get(number, self)
        return moved

    def target(self, channel_slice: ChannelSlice) -> Float[Tensor, "out c"]:
        """What the columns of a slice are to be rounded to, float32."""
        return self.problems[channel_slice.site].target[:, channel_slice.columns].float()

    def _importance(self, channel_slice: ChannelSlice) -> Float[Tensor, "c"] | Float[Tensor, "c c"] | None:
        """How much the channels of a slice count, or pairs of them; None without a metric (see `Codebook.fit`)."""
        metric, columns = self.problems[channel_slice.site].metric, channel_slice.columns
        if metric is None:
            return None
        return metric.mean_gram()[columns][:, columns] if self.codebook.needs_gram else metric.channel_importance()[columns]

    def relative_error(self, number: int, rate: Rate) -> list[Float[Tensor, "_"]]:
        """`|W_c - Q(W)_c|^2 / |W_c|^2` of every channel under plain rounding, slice by slice; 0 for a channel of zeros."""
        errors = []
        for channel_slice, codebook in zip(self.table_groups[number].slices, self(number, rate)[0], strict=True):
            weight = self.target(channel_slice)
            values = codebook.encode(to_vectors(weight, codebook.vector_length), 0, None)[1].flatten(1)[:, : weight.shape[1]]
            norm = weight.square().sum(0)
            errors.append(torch.where(norm > 0, (weight - values).square().sum(0) / norm.clamp(min=1e-30), 0.0))
        return errors


def rate_table(cache: CodebookCache, distortion: Literal["measured", "gaussian"] | None) -> RateTable:
    """The stored bits of every table group at every rate, exact; and the loss as `distortion` predicts it, 0 where it is None.

    `gaussian`: what the codebook says of itself on a Gaussian source (`Codebook.distortion`). `measured`: of fitted codebooks.
    """
    groups, rates = cache.table_groups, sorted(cache.codebook.rates(), key=lambda r: r.index_bits)
    bits = torch.tensor([[cache.codebook.storage_bits(g.slices, r) for r in rates] for g in groups], dtype=torch.int64)
    loss = torch.zeros(bits.shape, dtype=torch.float64)
    if distortion == "gaussian":
        loss = torch.tensor([[g.info.score * cache.codebook.distortion(r) for r in rates] for g in groups], dtype=torch.float64)
    elif distortion == "measured":
        for g, table_group in enumerate(groups):
            scores = [cache.problems[s.site].score[s.columns].double() for s in table_group.slices]
            for r, rate in enumerate(rates):
                errors = cache.relative_error(g, rate)
                loss[g, r] = sum(float((s * e.double().cpu()).sum()) for s, e in zip(scores, errors, strict=True))
    return RateTable([g.info for g in groups], rates, bits, loss)
