"""From chosen rates to stored weights: all layers at once, or block by block towards targets that a gradient has moved."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers import PreTrainedModel

from mgvq.drift import AnyBatch, Drift, by_block
from mgvq.errors import UserError
from mgvq.formats.grouped import GroupedWeight
from mgvq.model.sites import linear
from mgvq.types import Compensation, FittedPiece, Metric, QuantizedWeight, Rate, Shift, Site, StatsBank
from mgvq.units import Fits


@dataclass(frozen=True)
class Samples:
    """For gradients, and, disjoint from them, for choosing between steps."""

    batches: Sequence[AnyBatch]
    heldout: Sequence[AnyBatch]


@dataclass(frozen=True)
class Layers:
    """Rounds layers to their fitted codebooks. `ids`: the packed group ids by `Site.reads`, of layers with several groups."""

    compensation: Compensation
    metrics: Mapping[Site, Metric]
    scores: Mapping[Site, Float[Tensor, "_"]]
    ids: Mapping[str, UInt8[Tensor, "_"]]

    def round(self, fits: Fits, rates: Sequence[Rate], sites: Sequence[Site], flags: list[str]) -> dict[Site, QuantizedWeight]:
        """`sites` alone; fits and rates are of all units."""
        fitted: dict[Site, list[FittedPiece]] = {site: [] for site in sites}
        for u, unit in enumerate(fits.units):
            if not any(piece.site in fitted for piece in unit.pieces):
                continue
            codebooks, taken = fits(u, rates[u])
            flags += taken
            for piece, codebook in zip(unit.pieces, codebooks, strict=True):
                if piece.site in fitted:
                    fitted[piece.site].append(FittedPiece(piece, codebook))
        return {site: self._round(site, fits.weights[site], fitted[site], flags) for site in sites}

    def _round(self, site: Site, weight: Tensor, fitted: Sequence[FittedPiece], flags: list[str]) -> QuantizedWeight:
        pieces = sorted(fitted, key=lambda f: f.piece.group)
        codes = self.compensation.round(weight, self.metrics.get(site), pieces, self.scores[site], flags)
        stored = tuple(f.codebook.weight(c) for f, c in zip(pieces, codes, strict=True))
        return stored[0] if site.reads not in self.ids else GroupedWeight(stored, self.ids[site.reads], site.in_features)  # type: ignore[arg-type]


def shifted_rounding(
    model: PreTrainedModel,
    sites: Sequence[Site],
    bank: StatsBank,
    shift: Shift,
    samples: Samples,
    fits: Fits,
    rates: Sequence[Rate],
    layers: Layers,
    flags: list[str],
) -> tuple[dict[Site, QuantizedWeight], pd.DataFrame]:
    """Block by block: take the gradient with the blocks before quantised, try the steps, keep the best on held-out samples.

    Codebooks are fitted to the moved targets. `model` is as before in the end. The table has a row a block and step that was
    tried: the gradient's norm, the change of the loss that it predicts, and the loss on the held-out samples. Flag `no_step`: all
    steps chosen were 0. Raises UserError for a gradient that is zero.
    """
    drift = Drift(model, samples.batches, samples.heldout)
    done: dict[Site, QuantizedWeight] = {}
    rows: list[dict[str, object]] = []
    with _restored(model, sites) as weights:
        fits = fits.moved(weights)  # those of the model change as blocks are quantised
        for number, block in enumerate(by_block(sites)):
            gradient = drift.gradient(block, shift.source) if shift.refresh else _static(bank, block)
            norm = sum(float(g.square().sum()) for g in gradient.values()) ** 0.5
            undisturbed = number == 0 and shift.source == "kl"  # nothing is quantised yet, and what is left is rounding noise
            if norm == 0 and not undisturbed:
                raise UserError(
                    f"the gradient of {block[0].name} and its block is zero: a gradient-aware compensation has nothing to go by."
                )
            trials = []
            for step in shift.steps[:1] if undisturbed else shift.steps:
                targets = {s: shift.target(weights[s], layers.metrics[s], gradient[s].to(weights[s].device), step) for s in block}
                taken: list[str] = []
                stored = layers.round(fits.moved(targets) if step else fits, rates, block, taken)
                decoded = {s: w.decode() for s, w in stored.items()}
                predicted = sum(float((gradient[s] * (decoded[s] - weights[s].float()).cpu()).sum()) for s in block)
                _install(model, decoded)
                loss = drift.heldout_loss(shift.source)
                trials.append((loss, step, stored, decoded, taken))
                where = {"tower": block[0].tower, "block": block[0].block, "site": block[0].name}
                rows.append({**where, "gradient_norm": norm, "step": step, "first_order": predicted, "heldout_loss": loss})
            loss, step, stored, decoded, taken = min(trials, key=lambda t: t[:2])
            _install(model, decoded)
            done |= stored
            flags += taken
            for row in rows[-len(trials) :]:
                row["chosen"] = row["step"] == step
    table = pd.DataFrame(rows)
    if not table.step[table.chosen].any():
        flags.append("no_step")
    return {site: done[site] for site in sites}, table


def _static(bank: StatsBank, block: Sequence[Site]) -> dict[Site, Tensor]:
    gradients = {}
    for site in block:
        gradient = bank[site].gradient
        assert gradient is not None
        gradients[site] = gradient
    return gradients


def _install(model: PreTrainedModel, weights: Mapping[Site, Tensor]) -> None:
    for site, weight in weights.items():
        parameter = linear(model, site).weight
        parameter.data.copy_(weight)


@contextmanager
def _restored(model: PreTrainedModel, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """A copy of the weights, which the model has back afterwards, whatever happens inside."""
    kept = {site: linear(model, site).weight.detach().clone() for site in sites}
    try:
        yield kept
    finally:
        _install(model, kept)
