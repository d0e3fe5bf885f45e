"""From chosen rates to stored weights: tables fitted, codes chosen, tables refitted; and the proxy error after each part."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mgvq.compensation.none import NoCompensation
from mgvq.formats.grouped import GroupedWeight
from mgvq.progress import progress
from mgvq.protocols import CodedPiece, Compensation, FittedPiece, QuantizedWeight, Refit
from mgvq.types import Metric, Rate, Site
from mgvq.units import Fits, Unit


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

    pieces: list[FittedPiece]
    codes: list[Tensor]

    def decode(self, like: Tensor) -> Float[Tensor, "out in"]:
        values = torch.empty(like.shape, device=like.device)
        for fitted, codes in zip(self.pieces, self.codes, strict=True):
            values[:, fitted.piece.columns.to(like.device).long()] = fitted.codebook.weight(codes).decode()
        return values


@dataclass(frozen=True)
class Layers:
    """Rounds layers to their fitted codebooks. `weights` are those of full precision, `ids` the packed group ids by
    `Site.reads`, of layers with several groups."""

    compensation: Compensation
    refit: Refit | None
    weights: Mapping[Site, Float[Tensor, "_ _"]]
    metrics: Mapping[Site, Metric]
    scores: Mapping[Site, Float[Tensor, "_"]]
    ids: Mapping[str, UInt8[Tensor, "_"]]

    def round(
        self, fits: Fits, rates: Sequence[Rate], sites: Sequence[Site], flags: list[str], part: str = "feedback"
    ) -> Rounded:
        """`sites` alone; fits and rates are of all units, and `fits.weights` is what is to be rounded.

        The proxy error of a layer is its metric's loss over that of the weight as a whole, by part: `nearest` (no compensation),
        `part` (the compensation's codes) and `refit`. Empty where there is no metric.
        """
        rounded = Rounded()
        for together in progress(list(_sharing(fits.units, sites)), "layers"):
            coded, errors = self._round(fits, rates, together, flags, part)
            for site, own in coded.items():
                rounded.decoded[site] = own.decode(fits.weights[site])
                rounded.stored[site] = self._store(site, own)
            rounded.proxy.update(errors)
        return rounded

    def _round(
        self, fits: Fits, rates: Sequence[Rate], sites: Sequence[Site], flags: list[str], part: str
    ) -> tuple[dict[Site, _Coded], dict[Site, dict[str, float]]]:
        pieces = self._fitted(fits, rates, sites, flags)
        errors: dict[Site, dict[str, float]] = {site: {} for site in sites}
        nearest = replace(self, compensation=NoCompensation())
        self._note(errors, "nearest", {site: nearest._compensated(fits, site, own, []) for site, own in pieces.items()})
        coded = {site: self._compensated(fits, site, own, flags) for site, own in pieces.items()}
        self._note(errors, part, coded)
        if self.refit is not None:
            coded = self._refitted(fits, coded)
            for _ in range(self.refit.rounds - 1):
                again = {site: self._compensated(fits, site, own.pieces, []) for site, own in coded.items()}
                again = self._refitted(fits, again)
                if not self._loss(fits, again) < self._loss(fits, coded):
                    break
                coded = again
            self._note(errors, "refit", coded)
        return coded, errors

    def _fitted(
        self, fits: Fits, rates: Sequence[Rate], sites: Sequence[Site], flags: list[str]
    ) -> dict[Site, list[FittedPiece]]:
        fitted: dict[Site, list[FittedPiece]] = {site: [] for site in sites}
        for u, unit in enumerate(fits.units):
            if not any(piece.site in fitted for piece in unit.pieces):
                continue
            codebooks, taken = fits(u, rates[u])
            flags += taken
            for piece, codebook in zip(unit.pieces, codebooks, strict=True):
                if piece.site in fitted:
                    fitted[piece.site].append(FittedPiece(piece, codebook))
        return {site: sorted(pieces, key=lambda f: f.piece.group) for site, pieces in fitted.items()}

    def _compensated(self, fits: Fits, site: Site, pieces: list[FittedPiece], flags: list[str]) -> _Coded:
        codes = self.compensation.round(fits.weights[site], self.metrics.get(site), pieces, self.scores[site], flags)
        return _Coded(pieces, list(codes))

    def _refitted(self, fits: Fits, coded: Mapping[Site, _Coded]) -> dict[Site, _Coded]:
        """Unit after unit, each given the others. A unit that other layers have a part in stays as it is."""
        assert self.refit is not None
        moved = {site: replace(own, pieces=list(own.pieces)) for site, own in coded.items()}
        values = {site: own.decode(fits.weights[site]) for site, own in moved.items()}
        for unit in fits.units:
            if any(piece.site not in moved for piece in unit.pieces):
                continue
            parts = []
            for piece in unit.pieces:
                own, columns = moved[piece.site], piece.columns.to(values[piece.site].device).long()
                target = fits.weights[piece.site].float() - values[piece.site]
                target[:, columns] = fits.weights[piece.site][:, columns].float()
                fitted, codes, metric = own.pieces[piece.group], own.codes[piece.group], self.metrics[piece.site]
                parts.append(CodedPiece(fitted=fitted, codes=codes, target=target, metric=metric))
            for part, codebook in zip(parts, self.refit(parts), strict=True):
                piece = part.fitted.piece
                moved[piece.site].pieces[piece.group] = FittedPiece(piece, codebook)
                values[piece.site][:, piece.columns.to(part.target.device).long()] = codebook.weight(part.codes).decode()
        return moved

    def _loss(self, fits: Fits, coded: Mapping[Site, _Coded]) -> float:
        """Of what was to be rounded."""
        targets = {site: fits.weights[site].float() for site in coded}
        return sum(self.metrics[site].loss(own.decode(targets[site]) - targets[site]) for site, own in coded.items())

    def _note(self, errors: dict[Site, dict[str, float]], part: str, coded: Mapping[Site, _Coded]) -> None:
        for site, own in coded.items():
            if metric := self.metrics.get(site):
                weight = self.weights[site].float()
                errors[site][part] = metric.loss(own.decode(weight) - weight) / max(metric.loss(weight), 1e-30)

    def _store(self, site: Site, coded: _Coded) -> QuantizedWeight:
        stored = tuple(f.codebook.weight(c) for f, c in zip(coded.pieces, coded.codes, strict=True))
        return stored[0] if site.reads not in self.ids else GroupedWeight(stored, self.ids[site.reads], site.in_features)  # type: ignore[arg-type]


def _sharing(units: Sequence[Unit], sites: Sequence[Site]) -> Iterator[list[Site]]:
    """The sites in runs that share no table with each other; one is refitted and rounded again without the others."""
    left, linked = list(sites), [{p.site for p in unit.pieces} for unit in units]
    while left:
        together = {left[0]}
        while grown := set().union(*(s for s in linked if s & together)) - together:
            together |= grown
        yield [site for site in left if site in together]
        left = [site for site in left if site not in together]
