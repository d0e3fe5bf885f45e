"""Units: pieces of layers that share a codebook table, hence a rate; and what every rate costs and loses on each of them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.formats.vector import to_vectors
from mgvq.protocols import Codebook, FittedCodebook
from mgvq.types import Piece, Rate, RateTable, Site, UnitInfo

Energies = Mapping[Site, Float[Tensor, "_"] | Float[Tensor, "_ _"]]  # of channels, or of pairs of them (`Codebook.fit`)


@dataclass(frozen=True)
class Unit:
    """The pieces in the order of the layers, and what an allocation may know of them."""

    info: UnitInfo
    pieces: tuple[Piece, ...]


def cut_units(
    groups: Mapping[Site, Int[Tensor, "_"]], scores: Mapping[Site, Float[Tensor, "_"]], codebook: Codebook
) -> list[Unit]:
    """All pieces of all layers, gathered by the codebook's rule; units in the order of their first piece."""
    gathered: dict[str, list[Piece]] = defaultdict(list)
    for site, group in groups.items():
        for number in range(int(group.max()) + 1):
            piece = Piece(site, number, torch.nonzero(group == number).flatten())
            gathered[codebook.unit(piece)].append(piece)
    totals = {name: sum(float(scores[p.site][p.columns].double().sum()) for p in pieces) for name, pieces in gathered.items()}
    quantiles = _quantiles(gathered, totals)
    depths = _depths(list(groups))
    return [
        Unit(
            UnitInfo(
                name=name,
                tower=pieces[0].site.tower,
                kind=pieces[0].site.kind,
                block=pieces[0].site.block,
                depth=depths[pieces[0].site],
                group=pieces[0].group,
                num_weights=sum(p.num_weights for p in pieces),
                score=totals[name],
                quantile=quantiles[name],
            ),
            tuple(pieces),
        )
        for name, pieces in gathered.items()
    ]


def _quantiles(gathered: Mapping[str, Sequence[Piece]], totals: Mapping[str, float]) -> dict[str, float]:
    """Rank of a unit's mean channel score among those of its tower, 0 .. 1; a unit alone: .5."""
    towers: dict[str, list[str]] = defaultdict(list)
    for name, pieces in gathered.items():
        towers[pieces[0].site.tower].append(name)
    ranks: dict[str, float] = {}
    for names in towers.values():
        names.sort(key=lambda name: totals[name] / sum(len(p.columns) for p in gathered[name]))
        ranks |= {name: rank / (len(names) - 1) if len(names) > 1 else 0.5 for rank, name in enumerate(names)}
    return ranks


def _depths(sites: Sequence[Site]) -> dict[Site, float]:
    last: dict[str, int] = defaultdict(int)
    for site in sites:
        last[site.tower] = max(last[site.tower], site.block or 0)
    return {s: 0.5 if s.block is None or not last[s.tower] else s.block / last[s.tower] for s in sites}


class Fits:
    """Codebooks of the units at the rates that are asked for, each fitted once; `flags` of a fit count when it is used."""

    def __init__(self, units: Sequence[Unit], codebook: Codebook, weights: Mapping[Site, Tensor], energies: Energies) -> None:
        self.units, self.codebook, self.weights, self.energies = units, codebook, weights, energies
        self._kept: tuple[Fits, frozenset[int]] | None = None  # whose tables to take, and for which units
        self._done: dict[tuple[int, str], tuple[Sequence[FittedCodebook], list[str]]] = {}

    def __call__(self, unit: int, rate: Rate) -> tuple[Sequence[FittedCodebook], list[str]]:
        """One codebook a piece of the unit, and the fallbacks that were taken."""
        if self._kept is not None and unit in self._kept[1]:
            return self._kept[0](unit, rate)
        if (unit, rate.name) not in self._done:
            pieces, flags = self.units[unit].pieces, []
            weights = [self.columns(p) for p in pieces]
            energies = [_of_columns(self.energies[p.site], p) if p.site in self.energies else None for p in pieces]
            fitted = self.codebook.fit(self.units[unit].info.name, weights, rate, energies, flags)
            self._done[unit, rate.name] = fitted, flags
        return self._done[unit, rate.name]

    def moved(self, targets: Mapping[Site, Tensor]) -> "Fits":
        """The same with other weights for some layers, to which their units are fitted; a unit that other layers have a part in
        keeps its tables."""
        moved = Fits(self.units, self.codebook, {**self.weights, **targets}, self.energies)
        kept = (u for u, unit in enumerate(self.units) if any(piece.site not in targets for piece in unit.pieces))
        moved._kept = self, frozenset(kept)
        return moved

    def columns(self, piece: Piece) -> Float[Tensor, "out c"]:
        """The weights of a piece, float32."""
        return self.weights[piece.site][:, piece.columns].float()

    def relative_error(self, unit: int, rate: Rate) -> list[Float[Tensor, "_"]]:
        """For every piece and channel, `|W_c - Q(W)_c|^2 / |W_c|^2` of plain rounding; 0 for a channel of zero weights."""
        errors = []
        for piece, fitted in zip(self.units[unit].pieces, self(unit, rate)[0], strict=True):
            weight = self.columns(piece)
            values = fitted.encode(to_vectors(weight, fitted.vector_length), 0, None)[1].flatten(1)[:, : weight.shape[1]]
            energy = weight.square().sum(0)
            errors.append(torch.where(energy > 0, (weight - values).square().sum(0) / energy.clamp(min=1e-30), 0.0))
        return errors


def _of_columns(energy: Float[Tensor, "_"] | Float[Tensor, "_ _"], piece: Piece) -> Tensor:
    return energy[piece.columns] if energy.ndim == 1 else energy[piece.columns][:, piece.columns]


def rate_table(
    fits: Fits, scores: Mapping[Site, Float[Tensor, "_"]], distortion: Literal["measured", "gaussian"] | None
) -> RateTable:
    """Costs of every unit at every rate, exact; losses as `distortion` asks, zeros where nobody looks at them.

    `gaussian`: `2^(-2 bits)`, the distortion-rate function of a Gaussian source. `measured`: of the fitted codebooks.
    """
    rates, infos = sorted(fits.codebook.rates(), key=lambda r: r.index_bits), [u.info for u in fits.units]
    bits = torch.tensor([[fits.codebook.storage_bits(u.pieces, r) for r in rates] for u in fits.units], dtype=torch.int64)
    loss = torch.zeros(bits.shape, dtype=torch.float64)
    if distortion == "gaussian":
        loss = torch.tensor([[i.score * 4.0**-r.index_bits for r in rates] for i in infos], dtype=torch.float64)
    elif distortion == "measured":
        for u, unit in enumerate(fits.units):
            for r, rate in enumerate(rates):
                errors = fits.relative_error(u, rate)
                parts = zip(unit.pieces, errors, strict=True)
                loss[u, r] = sum(float((scores[p.site][p.columns].double().cpu() * e.double().cpu()).sum()) for p, e in parts)
    return RateTable(infos, rates, bits, loss)
