"""Rounding block by block, towards targets that a gradient has moved; how far is chosen on held-out samples."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd
from torch import Tensor
from transformers import PreTrainedModel

from mgvq.drift import AnyBatch, Drift, by_block
from mgvq.errors import UserError
from mgvq.model.sites import linear
from mgvq.rounding import Layers, Rounded
from mgvq.types import Rate, Shift, Site, StatsBank
from mgvq.units import Fits


@dataclass(frozen=True)
class Samples:
    """For gradients, and, disjoint from them, for choosing between steps."""

    batches: Sequence[AnyBatch]
    heldout: Sequence[AnyBatch]


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
) -> tuple[Rounded, pd.DataFrame]:
    """Block by block: take the gradient with the blocks before quantised, try the steps, keep the best on held-out samples.

    Steps are tried from the smallest up, until one is worse than the one before it.

    From the second sweep on all blocks are quantised, and the gradient holds the errors of the block itself and of those behind
    it too: the target that the block was rounded to is moved once more, and what comes of that has to beat what there is.

    Codebooks are fitted to the moved targets. `model` is as before in the end. The table has a row a sweep, block and step that
    was tried: the gradient's norm, the change of the loss that it predicts, the loss on the held-out samples before (of the
    blocks so far; NaN in the first sweep) and after. Flag `no_step`: all steps chosen were 0. Raises UserError for a gradient
    that is zero.
    """
    drift = Drift(model, sites, samples.batches, samples.heldout, shift.source)
    best: dict[str, _Trial] = {}
    rows: list[dict[str, object]] = []
    with _restored(model, sites) as weights:
        targets = dict(weights)
        fits = fits.moved(weights)  # those of the model change as blocks are quantised
        for sweep in range(shift.sweeps):
            drift.unsettle()
            for block in by_block(sites):
                gradient = drift.gradient(block) if shift.refresh else _static(bank, block)
                norm = sum(float(g.square().sum()) for g in gradient.values()) ** 0.5
                untouched = (
                    not best and shift.source != "sft"
                )  # nothing is quantised yet: what gradient there is is rounding noise
                if norm == 0 and not untouched:
                    raise UserError(
                        f"{block[0].name} and its block: the gradient is zero, so a gradient-aware compensation has nothing to "
                        "go by; compensation=hessian does without."
                    )
                present = {site: linear(model, site).weight.detach().clone() for site in block}
                before = drift.heldout_loss() if sweep else float("nan")
                trials = []
                for step in shift.steps[:1] if untouched else shift.steps[1:] if sweep else shift.steps:
                    moved = {
                        s: shift.target(targets[s], layers.metrics[s], gradient[s].to(targets[s].device), step) for s in block
                    }
                    found: list[str] = []
                    part = "shifted" if step else "feedback"
                    rounded = layers.round(fits.moved(moved) if step else fits, rates, block, found, part)
                    _install(model, rounded.decoded)
                    trials.append(_Trial(drift.heldout_loss(), step, moved, rounded, found))
                    change = sum(float((gradient[s] * (rounded.decoded[s] - present[s].float()).cpu()).sum()) for s in block)
                    rows.append(
                        {"sweep": sweep, "tower": block[0].tower, "block": block[0].block, "site": block[0].name}
                        | {"step": step, "gradient_norm": norm, "first_order": change}
                        | {"heldout_before": before, "heldout_loss": trials[-1].loss, "chosen": False}
                    )
                    if trials[-1].loss > (trials[-2].loss if len(trials) > 1 else before):
                        break  # larger steps would be worse still
                least = min(range(len(trials)), key=lambda t: trials[t].loss)
                if sweep and not trials[least].loss < before:
                    _install(model, present)
                else:
                    rows[least - len(trials)]["chosen"] = True
                    best[block[0].name] = trials[least]
                    targets |= trials[least].targets
                    _install(model, trials[least].rounded.decoded)
                drift.settle(block)
    done = Rounded()
    for trial in best.values():
        done |= trial.rounded
        flags += trial.flags
    table = pd.DataFrame(rows)
    if not table.step[table.chosen].any():
        flags.append("no_step")
    return done, table


@dataclass(frozen=True)
class _Trial:
    """One step of one block: the loss on the held-out samples, and how it came about."""

    loss: float
    step: float
    targets: Mapping[Site, Tensor]
    rounded: Rounded
    flags: Sequence[str]


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
