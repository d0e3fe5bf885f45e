"""From chosen rates to stored weights: tables fitted, codes chosen, tables refitted; and the proxy error after each part."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mgvq.compensation.none import NoCompensation
from mgvq.formats.grouped import GroupedWeight
from mgvq.progress import progress
from mgvq.protocols import CodedSlice, Compensation, FittedSlice, QuantizedWeight, Refit
from mgvq.quantization.codebooks import CodebookCache
from mgvq.quantization.table_groups import TableGroup
from mgvq.types import Metric, Rate, Site


@dataclass(frozen=True)
class Rounded:
    """Layers as they are stored and decoded, and their proxy error by part (see `Layers.round`), on the way to here."""

    stored: dict[Site, QuantizedWeight] = field(default_factory=dict)
    decoded: dict[Site, Float[Tensor, "_ _"]] = field(default_factory=dict)
    proxy: dict[Site, dict[str, float]] = field(default_factory=dict)

    def __or__(self, later: "Rounded") -> "Rounded":
        """Both; of layers that both have, what is later."""
        return Rounded(self.stored | later.stored, self.decoded | later.decoded, self.proxy | later.proxy)


@dataclass(frozen=True)
class _Coded:
    """A layer's pieces by group, and their codes."""

    slices: list[FittedSlice]
    codes: list[Tensor]

    def decode(self, like: Tensor) -> Float[Tensor, "out in"]:
        values = torch.empty(like.shape, device=like.device)
        for fitted, codes in zip(self.slices, self.codes, strict=True):
            values[:, fitted.channel_slice.columns.to(like.device).long()] = fitted.codebook.weight(codes).decode()
        return values


@dataclass(frozen=True)
class LayerRounder:
    """Rounds layers to their fitted codebooks. `weights` are those of full precision, `ids` the packed group ids by
    `Site.reads`, of layers with several groups."""

    compensation: Compensation
    refit: Refit | None
    weights: Mapping[Site, Float[Tensor, "_ _"]]
    metrics: Mapping[Site, Metric]
    scores: Mapping[Site, Float[Tensor, "_"]]
    ids: Mapping[str, UInt8[Tensor, "_"]]

    def round(
        self, cache: CodebookCache, rates: Sequence[Rate], sites: Sequence[Site], flags: list[str], part: str = "feedback"
    ) -> Rounded:
        """`sites` alone; fits and rates are of all units, and `fits.weights` is what is to be rounded.

        The proxy error of a layer is its metric's loss over that of the weight as a whole, by part: `nearest` (no compensation),
        `part` (the compensation's codes) and `refit`. Empty where there is no metric.
        """
        rounded = Rounded()
        for together in progress(list(_sharing(cache.table_groups, sites)), "layers"):
            coded, errors = self._round(cache, rates, together, flags, part)
            for site, own in coded.items():
                rounded.decoded[site] = own.decode(cache.weights[site])
                rounded.stored[site] = self._store(site, own)
            rounded.proxy.update(errors)
        return rounded

    def _round(
        self, cache: CodebookCache, rates: Sequence[Rate], sites: Sequence[Site], flags: list[str], part: str
    ) -> tuple[dict[Site, _Coded], dict[Site, dict[str, float]]]:
        slices = self._fitted(cache, rates, sites, flags)
        errors: dict[Site, dict[str, float]] = {site: {} for site in sites}
        nearest = replace(self, compensation=NoCompensation())
        self._note(errors, "nearest", {site: nearest._compensated(cache, site, own, []) for site, own in slices.items()})
        coded = {site: self._compensated(cache, site, own, flags) for site, own in slices.items()}
        self._note(errors, part, coded)
        if self.refit is not None:
            coded = self._refitted(cache, coded)
            for _ in range(self.refit.rounds - 1):
                again = {site: self._compensated(cache, site, own.slices, []) for site, own in coded.items()}
                again = self._refitted(cache, again)
                if not self._loss(cache, again) < self._loss(cache, coded):
                    break
                coded = again
            self._note(errors, "refit", coded)
        return coded, errors

    def _fitted(
        self, cache: CodebookCache, rates: Sequence[Rate], sites: Sequence[Site], flags: list[str]
    ) -> dict[Site, list[FittedSlice]]:
        fitted: dict[Site, list[FittedSlice]] = {site: [] for site in sites}
        for u, table_group in enumerate(cache.table_groups):
            if not any(channel_slice.site in fitted for channel_slice in table_group.slices):
                continue
            codebooks, taken = cache(u, rates[u])
            flags += taken
            for channel_slice, codebook in zip(table_group.slices, codebooks, strict=True):
                if channel_slice.site in fitted:
                    fitted[channel_slice.site].append(FittedSlice(channel_slice, codebook))
        return {site: sorted(slices, key=lambda f: f.channel_slice.group) for site, slices in fitted.items()}

    def _compensated(self, cache: CodebookCache, site: Site, slices: list[FittedSlice], flags: list[str]) -> _Coded:
        codes = self.compensation.round(cache.weights[site], self.metrics.get(site), slices, self.scores[site], flags)
        return _Coded(slices, list(codes))

    def _refitted(self, cache: CodebookCache, coded: Mapping[Site, _Coded]) -> dict[Site, _Coded]:
        """Unit after unit, each given the others. A unit that other layers have a part in stays as it is."""
        assert self.refit is not None
        moved = {site: replace(own, slices=list(own.slices)) for site, own in coded.items()}
        values = {site: own.decode(cache.weights[site]) for site, own in moved.items()}
        for table_group in cache.table_groups:
            if any(channel_slice.site not in moved for channel_slice in table_group.slices):
                continue
            parts = []
            for channel_slice in table_group.slices:
                own, columns = (
                    moved[channel_slice.site],
                    channel_slice.columns.to(values[channel_slice.site].device).long(),
                )
                target = cache.weights[channel_slice.site].float() - values[channel_slice.site]
                target[:, columns] = cache.weights[channel_slice.site][:, columns].float()
                fitted, codes, metric = (
                    own.slices[channel_slice.group],
                    own.codes[channel_slice.group],
                    self.metrics[channel_slice.site],
                )
                parts.append(CodedSlice(fitted=fitted, codes=codes, target=target, metric=metric))
            for part, codebook in zip(parts, self.refit(parts), strict=True):
                channel_slice = part.fitted.channel_slice
                moved[channel_slice.site].slices[channel_slice.group] = FittedSlice(channel_slice, codebook)
                values[channel_slice.site][:, channel_slice.columns.to(part.target.device).long()] = codebook.weight(
                    part.codes
                ).decode()
        return moved

    def _loss(self, cache: CodebookCache, coded: Mapping[Site, _Coded]) -> float:
        """Of what was to be rounded."""
        targets = {site: cache.weights[site].float() for site in coded}
        return sum(self.metrics[site].loss(own.decode(targets[site]) - targets[site]) for site, own in coded.items())

    def _note(self, errors: dict[Site, dict[str, float]], part: str, coded: Mapping[Site, _Coded]) -> None:
        for site, own in coded.items():
            if metric := self.metrics.get(site):
                weight = self.weights[site].float()
                errors[site][part] = metric.loss(own.decode(weight) - weight) / max(metric.loss(weight), 1e-30)

    def _store(self, site: Site, coded: _Coded) -> QuantizedWeight:
        stored = tuple(f.codebook.weight(c) for f, c in zip(coded.slices, coded.codes, strict=True))
        return stored[0] if site.reads not in self.ids else GroupedWeight(stored, self.ids[site.reads], site.in_features)  # type: ignore[arg-type]


def _sharing(table_groups: Sequence[TableGroup], sites: Sequence[Site]) -> Iterator[list[Site]]:
    """The sites in runs that share no table with each other; one is refitted and rounded again without the others."""
    left, linked = list(sites), [{p.site for p in table_group.slices} for table_group in table_groups]
    while left:
        together = {left[0]}
        while grown := set().union(*(s for s in linked if s & together)) - together:
            together |= grown
        yield [site for site in left if site in together]
        left = [site for site in left if site not in together]
