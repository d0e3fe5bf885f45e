"""Rounding block by block, towards targets that a gradient has moved; how far is chosen on held-out samples."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import Tensor
from transformers import PreTrainedModel

from mgvq.compensation.direction import without_own_error
from mgvq.errors import UserError
from mgvq.model.blocks import Block, by_block, install, restored
from mgvq.model.sites import linear, site_weights
from mgvq.model.walk import AnyBatch
from mgvq.progress import progress
from mgvq.protocols import TargetShift
from mgvq.quantization.codebooks import CodebookCache
from mgvq.quantization.rounding import LayerRounder, Rounded
from mgvq.quantization.teacher import Teacher
from mgvq.types import Rate, Site, StatsBank


@dataclass(frozen=True)
class Samples:
    """The calibration samples of the block loop; the two parts share none."""

    batches: Sequence[AnyBatch]  # for gradients
    heldout: Sequence[AnyBatch]  # for choosing between steps


def blockwise_rounding(
    model: PreTrainedModel,
    sites: Sequence[Site],
    bank: StatsBank,
    shift: TargetShift,
    samples: Samples,
    cache: CodebookCache,
    rates: Sequence[Rate],
    rounder: LayerRounder,
    flags: list[str],
) -> tuple[Rounded, pd.DataFrame]:
    """At every block: take the gradient with the blocks before it quantised, try the steps, keep the best on held-out samples.

    With a `refresh` of n blocks one pass takes the gradients of n blocks that follow each other, so that the later ones do not
    see what the earlier ones of the n have cost. A block that comes before anything is quantised does not count among the n,
    since its gradient is rounding noise.

    Steps are tried from the smallest up, until one is worse than the one before it. From the second sweep on all blocks are
    quantised, and the gradient holds the errors of the block itself and of those behind it too: without its own, which rounding
    makes anew, it moves the target that the block was rounded to once more, and the result has to beat the one that is there.

    Codebooks are fitted to the moved targets. `model` has its own weights again in the end. The table has a row for every sweep,
    block and step that was tried: the gradient's norm, the change of the loss that it predicts to first order, the loss on the
    held-out samples before the block was rounded (NaN in the first sweep) and after. Flag `no_step`: all steps that were chosen
    are 0. Raises UserError for a gradient that is zero, and for a block that no step leaves with a finite loss.
    """
    blocks = list(by_block(sites))
    teacher = Teacher(model, sites, samples.batches, samples.heldout, shift.source)
    with restored(model, {site: weight.clone() for site, weight in site_weights(model, sites).items()}):
        loop = _Loop(model, bank, shift, teacher, cache, rates, rounder)
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
    """One step of one block, and what came of it."""

    step: float
    targets: Mapping[Site, Tensor]
    rounded: Rounded
    flags: Sequence[str]
    loss: float  # on the held-out samples
    first_order: float  # the change of the loss that the gradient predicts for the rounded weights


@dataclass
class _Loop:
    """What the blocks have been rounded to so far."""

    model: PreTrainedModel
    bank: StatsBank
    shift: TargetShift
    teacher: Teacher
    cache: CodebookCache
    rates: Sequence[Rate]
    rounder: LayerRounder
    targets: dict[Site, Tensor] = field(default_factory=dict)  # of the layers whose chosen trial has moved theirs
    gradients: dict[Site, Tensor] = field(default_factory=dict)  # of blocks that are still to be visited
    chosen: dict[str, _Trial] = field(default_factory=dict)  # by the block's first layer
    rows: list[dict[str, Any]] = field(default_factory=list)  # one for every trial

    def visit(self, sweep: int, blocks: Sequence[Block]) -> None:
        """Choose a step for the first of the blocks that are still to be visited, and leave it rounded in the model."""
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
        best = min(trials, key=lambda trial: trial.loss if math.isfinite(trial.loss) else math.inf)
        improves = math.isfinite(best.loss) and not best.loss >= before  # before is NaN in the first sweep: anything will do
        if not improves and not math.isfinite(before):
            raise UserError(
                f"{name} and its block: the loss on the held-out samples is not finite, whatever step is taken. The model's "
                "answers leave the range of its dtype: set model.dtype=float32; or compensation=hessian, which asks for no loss."
            )
        if improves:
            self.chosen[name] = best
            self.targets |= best.targets
        install(self.model, best.rounded.decoded if improves else present)
        for trial in trials:
            self.rows.append(
                {"sweep": sweep, "tower": block[0].tower, "block": block[0].block, "site": name, "step": trial.step}
                | {"gradient_norm": norm, "first_order": trial.first_order, "heldout_before": before, "heldout_loss": trial.loss}
                | {"chosen": improves and trial is best}
            )

    def _gradient(self, blocks: Sequence[Block]) -> dict[Site, Tensor]:
        """Of the first block: from full precision, or left by an earlier pass, or from a pass over as many as go together."""
        if not self.shift.refresh:
            return {site: gradient for site in blocks[0] if (gradient := self.bank[site].gradient) is not None}
        if blocks[0][0] not in self.gradients:
            together = blocks[: int(self.shift.refresh)]
            self.gradients |= self.teacher.gradient([site for block in together for site in block])
        return {site: self.gradients.pop(site) for site in blocks[0]}

    def _trials(
        self,
        block: Block,
        gradient: Mapping[Site, Tensor],
        present: Mapping[Site, Tensor],
        steps: Sequence[float],
        before: float,
    ) -> Iterator[_Trial]:
        """Step after step, until one is worse than the one before it: larger ones would be worse still."""
        last = before
        for step in steps:
            targets = {site: self._target(site, gradient[site], present[site], step) for site in block}
            flags: list[str] = []
            cache, name = (self.cache.with_targets(targets), "shifted") if step else (self.cache, "feedback")
            rounded = self.rounder.round(cache, self.rates, block, flags, name)
            install(self.model, rounded.decoded)
            change = {site: (rounded.decoded[site] - weight.float()).cpu() for site, weight in present.items()}
            first_order = sum(float((gradient[site] * change[site]).sum()) for site in block)
            loss = self.teacher.heldout_loss()
            yield _Trial(step, targets, rounded, flags, loss, first_order)
            if loss > last:
                return
            if math.isfinite(loss):
                last = loss

    def _target(self, site: Site, gradient: Tensor, present: Tensor, step: float) -> Tensor:
        problem = self.cache.problems[site]
        assert problem.metric is not None, "the method's checks ask for a metric"
        target, gradient = problem.target, gradient.to(problem.target.device)
        if problem.transform:
            gradient = problem.transform.weight(gradient)
        if site in self.targets:  # an earlier sweep has rounded it, with an error that the gradient knows
            target = self.targets[site]
            gradient = without_own_error(gradient, problem.metric, problem.of_model(present) - target)
        return self.shift.target(target, problem.metric, gradient, step)
