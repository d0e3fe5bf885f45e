"""Rounding block by block, towards targets that a gradient has moved; how far is chosen on held-out samples."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import Tensor
from transformers import PreTrainedModel

from mgvq.errors import UserError
from mgvq.model.sites import linear
from mgvq.progress import progress
from mgvq.protocols import TargetShift
from mgvq.quantization.codebooks import CodebookCache
from mgvq.quantization.rounding import LayerRounder, Rounded
from mgvq.quantization.teacher import AnyBatch, Teacher, by_block
from mgvq.types import Rate, Site, StatsBank


@dataclass(frozen=True)
class Samples:
    """For gradients, and, disjoint from them, for choosing between steps."""

    batches: Sequence[AnyBatch]
    heldout: Sequence[AnyBatch]


def shifted_rounding(
    model: PreTrainedModel,
    sites: Sequence[Site],
    bank: StatsBank,
    shift: TargetShift,
    samples: Samples,
    cache: CodebookCache,
    rates: Sequence[Rate],
    layers: LayerRounder,
    flags: list[str],
) -> tuple[Rounded, pd.DataFrame]:
    """Block by block: take the gradient with the blocks before quantised, try the steps, keep the best on held-out samples.

    With a `refresh` of n blocks one pass takes the gradients of n blocks that follow each other, so that all but the first have
    theirs without what the others of the n have cost. A block that comes before anything is quantised does not count: its
    gradient is nothing that others could use.

    Steps are tried from the smallest up, until one is worse than the one before it. From the second sweep on all blocks are
    quantised, and the gradient holds the errors of the block itself and of those behind it too: the target that the block was
    rounded to is moved once more, and what comes of that has to beat what there is.

    Codebooks are fitted to the moved targets. `model` is as before in the end. The table has a row a sweep, block and step that
    was tried: the gradient's norm, the change of the loss that it predicts, the loss on the held-out samples before (of the
    blocks so far; NaN in the first sweep) and after. Flag `no_step`: all steps chosen were 0. Raises UserError for a gradient
    that is zero.
    """
    blocks = list(by_block(sites))
    teacher = Teacher(model, sites, samples.batches, samples.heldout, shift.source)
    with _restored(model, sites) as weights:
        # Fits to a copy: the model's own weights change as blocks are quantised.
        loop = _Loop(model, bank, shift, teacher, cache.with_weights(weights), rates, layers, dict(weights))
        for sweep in range(shift.sweeps):
            teacher.unsettle()
            for number, block in enumerate(progress(blocks, f"blocks, sweep {sweep + 1}")):
                loop.visit(sweep, blocks[number:])
                teacher.settle(block)
    rounded = Rounded()
    for trial in loop.chosen.values():
        rounded |= trial.rounded
        flags += trial.flags
    table = pd.DataFrame(loop.rows)
    if not table.step[table.chosen].any():
        flags.append("no_step")
    return rounded, table


@dataclass(frozen=True)
class _Trial:
    """One step of one block: what came of it, its loss on the held-out samples, and the change that the gradient predicts."""

    step: float
    targets: Mapping[Site, Tensor]
    rounded: Rounded
    flags: Sequence[str]
    loss: float
    first_order: float


@dataclass
class _Loop:
    """What the blocks have been rounded to so far: their `targets`, the trial `chosen` for each, and a row for every trial."""

    model: PreTrainedModel
    bank: StatsBank
    shift: TargetShift
    teacher: Teacher
    cache: CodebookCache
    rates: Sequence[Rate]
    layers: LayerRounder
    targets: dict[Site, Tensor]
    gradients: dict[Site, Tensor] = field(default_factory=dict)  # of blocks that are still to be visited
    chosen: dict[str, _Trial] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def visit(self, sweep: int, blocks: Sequence[Sequence[Site]]) -> None:
        """Choose a step for the first of the blocks, which are those still to be visited, and leave it in the model as that
        rounds it."""
        block, name = blocks[0], blocks[0][0].name
        untouched = not self.chosen and self.shift.source != "sft"  # nothing is quantised yet: any gradient is rounding noise
        gradient = self._gradient(blocks[:1] if untouched else blocks)
        norm = sum(float(g.square().sum()) for g in gradient.values()) ** 0.5
        if norm == 0 and not untouched:
            raise UserError(
                f"{name} and its block: the gradient is zero, so a gradient-aware compensation has nothing to go by; "
                "compensation=hessian does without."
            )
        steps = self.shift.steps[:1] if untouched else self.shift.steps[1:] if sweep else self.shift.steps
        before = self.teacher.heldout_loss() if sweep else float("nan")
        present = {site: linear(self.model, site).weight.detach().clone() for site in block}
        trials = list(self._trials(block, gradient, present, steps, before))
        best = min(trials, key=lambda trial: trial.loss)
        improves = not best.loss >= before  # before is NaN in the first sweep, when anything will do
        if improves:
            self.chosen[name] = best
            self.targets |= best.targets
        _install(self.model, best.rounded.decoded if improves else present)
        for trial in trials:
            self.rows.append(
                {"sweep": sweep, "tower": block[0].tower, "block": block[0].block, "site": name, "step": trial.step}
                | {"gradient_norm": norm, "first_order": trial.first_order, "heldout_before": before, "heldout_loss": trial.loss}
                | {"chosen": improves and trial is best}
            )

    def _gradient(self, blocks: Sequence[Sequence[Site]]) -> dict[Site, Tensor]:
        """Of the first of the blocks: static, or what an earlier pass has left, or from a pass over as many as go together."""
        if not self.shift.refresh:
            return _static(self.bank, blocks[0])
        if blocks[0][0] not in self.gradients:
            together = blocks[: int(self.shift.refresh)]
            self.gradients |= self.teacher.gradient([site for block in together for site in block])
        return {site: self.gradients.pop(site) for site in blocks[0]}

    def _trials(
        self,
        block: Sequence[Site],
        gradient: Mapping[Site, Tensor],
        present: Mapping[Site, Tensor],
        steps: Sequence[float],
        before: float,
    ) -> Iterator[_Trial]:
        """Step after step, until one is worse than the one before it: larger ones would be worse still."""
        last = before
        for step in steps:
            with_weights = {s: self.shift.target(self.targets[s], self.layers.metrics[s], gradient[s].to(w.device), step)
                     for s, w in present.items()}  # fmt: skip
            flags: list[str] = []
            cache, part = (self.cache.with_weights(with_weights), "shifted") if step else (self.cache, "feedback")
            rounded = self.layers.round(cache, self.rates, block, flags, part)
            _install(self.model, rounded.decoded)
            first_order = sum(float((gradient[s] * (rounded.decoded[s] - w.float()).cpu()).sum()) for s, w in present.items())
            loss = self.teacher.heldout_loss()
            yield _Trial(step, with_weights, rounded, flags, loss, first_order)
            if loss > last:
                return
            last = loss


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
