"""Codebooks fitted to table groups, each once; and what every rate costs and loses on each of them."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.codebook.exponent import fit_in_range
from mgvq.formats.vector import to_vectors
from mgvq.protocols import Codebook, FittedCodebook
from mgvq.quantization.table_groups import TableGroup
from mgvq.types import ChannelSlice, Rate, RateTable, Site

Importances = Mapping[Site, Float[Tensor, "_"] | Float[Tensor, "_ _"]]  # of channels, or of pairs of them (`Codebook.fit`)


class CodebookCache:
    """Codebooks of the units at the rates that are asked for, each fitted once; `flags` of a fit count when it is used."""

    def __init__(
        self, table_groups: Sequence[TableGroup], codebook: Codebook, weights: Mapping[Site, Tensor], importances: Importances
    ) -> None:
        self.table_groups, self.codebook, self.weights, self.importances = table_groups, codebook, weights, importances
        self._kept: tuple[CodebookCache, frozenset[int]] | None = None  # whose tables to take, and for which units
        self._done: dict[tuple[int, str], tuple[Sequence[FittedCodebook], list[str]]] = {}

    def __call__(self, table_group: int, rate: Rate) -> tuple[Sequence[FittedCodebook], list[str]]:
        """One codebook a piece of the unit, and the fallbacks that were taken."""
        if self._kept is not None and table_group in self._kept[1]:
            return self._kept[0](table_group, rate)
        if (table_group, rate.name) not in self._done:
            slices, flags = self.table_groups[table_group].slices, []
            weights = [self.columns(p) for p in slices]
            importances = [_of_columns(self.importances[p.site], p) if p.site in self.importances else None for p in slices]
            fitted = fit_in_range(self.codebook, self.table_groups[table_group].info.name, weights, rate, importances, flags)
            self._done[table_group, rate.name] = fitted, flags
        return self._done[table_group, rate.name]

    def with_weights(self, targets: Mapping[Site, Tensor]) -> "CodebookCache":
        """The same with other weights for some layers, to which their units are fitted; a unit that other layers have a part in
        keeps its tables."""
        other = CodebookCache(self.table_groups, self.codebook, {**self.weights, **targets}, self.importances)
        kept = (
            u
            for u, table_group in enumerate(self.table_groups)
            if any(channel_slice.site not in targets for channel_slice in table_group.slices)
        )
        other._kept = self, frozenset(kept)
        return other

    def columns(self, channel_slice: ChannelSlice) -> Float[Tensor, "out c"]:
        """The weights of a piece, float32."""
        return self.weights[channel_slice.site][:, channel_slice.columns].float()

    def relative_error(self, table_group: int, rate: Rate) -> list[Float[Tensor, "_"]]:
        """For every piece and channel, `|W_c - Q(W)_c|^2 / |W_c|^2` of plain rounding; 0 for a channel of zero weights."""
        errors = []
        for channel_slice, fitted in zip(self.table_groups[table_group].slices, self(table_group, rate)[0], strict=True):
            weight = self.columns(channel_slice)
            values = fitted.encode(to_vectors(weight, fitted.vector_length), 0, None)[1].flatten(1)[:, : weight.shape[1]]
            importance = weight.square().sum(0)
            errors.append(torch.where(importance > 0, (weight - values).square().sum(0) / importance.clamp(min=1e-30), 0.0))
        return errors


def _of_columns(importance: Float[Tensor, "_"] | Float[Tensor, "_ _"], channel_slice: ChannelSlice) -> Tensor:
    return (
        importance[channel_slice.columns] if importance.ndim == 1 else importance[channel_slice.columns][:, channel_slice.columns]
    )


def rate_table(
    cache: CodebookCache, scores: Mapping[Site, Float[Tensor, "_"]], distortion: Literal["measured", "gaussian"] | None
) -> RateTable:
    """Costs of every unit at every rate, exact; losses as `distortion` asks, zeros where nobody looks at them.

    `gaussian`: `2^(-2 bits)`, the distortion-rate function of a Gaussian source. `measured`: of the fitted codebooks.
    """
    rates, infos = sorted(cache.codebook.rates(), key=lambda r: r.index_bits), [u.info for u in cache.table_groups]
    bits = torch.tensor(
        [[cache.codebook.storage_bits(u.slices, r) for r in rates] for u in cache.table_groups], dtype=torch.int64
    )
    loss = torch.zeros(bits.shape, dtype=torch.float64)
    if distortion == "gaussian":
        loss = torch.tensor([[i.score * 4.0**-r.index_bits for r in rates] for i in infos], dtype=torch.float64)
    elif distortion == "measured":
        for u, table_group in enumerate(cache.table_groups):
            for r, rate in enumerate(rates):
                errors = cache.relative_error(u, rate)
                parts = zip(table_group.slices, errors, strict=True)
                loss[u, r] = sum(float((scores[p.site][p.columns].double().cpu() * e.double().cpu()).sum()) for p, e in parts)
    return RateTable(infos, rates, bits, loss)
