"""Rounding block by block, towards targets that a gradient has moved; how far is chosen on held-out samples."""

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pandas as pd
from torch import Tensor

from mgvq.compensation.direction import without_own_error
from mgvq.compensation.ldl import factors_kept
from mgvq.errors import SharedFault, UserError
from mgvq.model.blocks import Block, by_block
from mgvq.model.weights import Weights
from mgvq.progress import progress
from mgvq.protocols import TargetShift
from mgvq.quantization.race import NOT_ASKED, HeldoutLoss, Race
from mgvq.quantization.rounding import Draft, LayerRounder, Rounded
from mgvq.quantization.subject import Subject
from mgvq.quantization.teacher import Teacher
from mgvq.types import Metric, Site, StatsBank


def blockwise_rounding(
    subject: Subject,
    bank: StatsBank,
    shift: TargetShift,
    rounder: LayerRounder,
    flags: list[str],
    finished: MutableMapping[str, Any] | None = None,
) -> tuple[Rounded, pd.DataFrame]:
    """At every block: take the gradient of the model as it is, try the steps, keep the best on held-out samples.

    With `start=rounded` all blocks are rounded first, sweep 0, without gradient and without a loss. With `full_precision` sweep 0
    tries steps already, from gradients with the blocks before it quantised and those behind it not.

    With a `refresh` of n blocks the gradients of n blocks that follow each other are taken at once, so that the later ones do not
    see what the earlier ones of the n have cost. A block that comes before anything is quantised does not count among the n:
    its gradient would be rounding noise, so that none is taken and nothing is moved. With several `minibatches` each gradient is
    of the next one, and a block that its samples do not reach takes that of another.

    Steps are tried from the smallest up, as far as a quadratic model of the loss looks for its minimum (`_leads_on`), which takes
    two evaluations for most blocks, and never beyond one that is worse than the one before it. With `racing` a step that a part
    of the samples shows to be worse is given up, and its loss in the table is an estimate. From sweep 1 on all blocks
    are quantised, and the gradient holds the errors of the block itself and of those behind it too: without its own, which
    rounding makes anew, it moves the target that the block was rounded to once more, and the result has to beat the one that is
    there.

    Codebooks are fitted to the moved targets, or left to the refit where there is one. The model has its own weights again in the
    end. The table has a row for every sweep, block and step that was tried: the gradient's norm, the change of the loss that it
    predicts to first order, the loss on the held-out samples before the block was rounded (NaN in sweep 0) and after (NaN in a
    sweep 0 without gradient, where nobody asks). Flag `no_step`: all steps that were chosen are 0. Raises UserError for a
    gradient that is zero, and for a block that no step leaves with a finite loss.

    `finished` is given an entry for every block of every sweep; those that it has already are taken over instead of being
    computed again, so that a loop which was stopped goes on from there, to the same bits. Gradients that wait for their blocks
    are entries too, until those are finished. Where weights are streamed, gradients, and the targets of a sweep in the next one,
    are read back from `finished`. Several processes run their own shares of the samples; the losses by which steps are chosen
    are those of all.
    """
    blocks, finished = list(by_block(subject.sites)), {} if finished is None else finished
    teacher = Teacher(subject, shift.source, minibatches=shift.minibatches)
    with subject.weights.unchanged(subject.sites):
        loop = _Loop(subject.weights, bank, shift, teacher, rounder, finished, len(blocks))
        sweeps = shift.sweeps + loop.starts_rounded
        visits = [(sweep, number) for sweep in range(sweeps) for number in range(len(blocks))]
        for sweep, number in progress(visits, "blocks" if sweeps == 1 else f"blocks in {sweeps} sweeps"):
            if number == 0:
                teacher.unsettle()
            name = f"sweep-{sweep}-block-{number:04}"
            if (visit := finished.get(name)) is None:
                plain = loop.starts_rounded and sweep == 0
                visit = finished[name] = loop.plain(blocks[number]) if plain else loop.visit(sweep, blocks[number:])
            loop.take_over(name, visit, blocks[number])
            with suppress(KeyError):
                del finished[_entry(sweep, blocks[number])]
            teacher.settle(blocks[number])
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
    loss: HeldoutLoss
    first_order: float  # the change of the loss that the gradient predicts for the rounded weights


@dataclass(frozen=True)
class _Visit:
    """What a visit of a block has changed in the loop."""

    chosen: _Trial | None  # None: what was there is better
    rows: Sequence[dict[str, Any]]
    loss: HeldoutLoss = NOT_ASKED  # of the model as the visit leaves it
    num_ahead: int = 0  # of the blocks that follow, so many have their gradients already


def _entry(sweep: int, block: Block) -> str:
    """The name of a gradient that waits for the visit of its block."""
    return f"sweep-{sweep}-gradient-{block[0].name}"


def _norm(gradient: Mapping[Site, Tensor]) -> float:
    return sum(float(g.square().sum()) for g in gradient.values()) ** 0.5


def _row(sweep: int, block: Block, trial: _Trial, norm: float, before: float, *, chosen: bool) -> dict[str, Any]:
    """What the table says of a trial."""
    where = {"sweep": sweep, "tower": block[0].tower, "block": block[0].block, "site": block[0].name}
    losses = {"heldout_before": before, "heldout_loss": trial.loss.mean, "num_samples": trial.loss.num_samples}
    return where | {"step": trial.step, "gradient_norm": norm, "first_order": trial.first_order} | losses | {"chosen": chosen}


@dataclass(frozen=True)
class _Point:
    """A step, what it left, and what the gradient had promised for the move of the targets."""

    step: float
    loss: float
    promised: float


def _leads_on(last: _Point, here: _Point, larger: float) -> bool:
    """Whether a larger step is worth an evaluation (docs/method.md, eq. (step-model)).

    The parabola that has the two losses, and at `last` the slope that the gradient promises, has to have its minimum nearer to
    the larger step than to this one. A step that is worse than the last ends the search, and one whose loss is no number does
    not.
    """
    if here.loss > last.loss:
        return False
    apart = here.step - last.step
    if not (math.isfinite(last.loss) and math.isfinite(here.loss)) or apart == 0:
        return True
    promised, found = here.promised - last.promised, here.loss - last.loss
    if found <= promised:  # the loss falls at least as fast as its slope: no minimum in sight
        return True
    return last.step - apart * promised / (2 * (found - promised)) > (here.step + larger) / 2


@dataclass
class _Loop:
    """What the blocks have been rounded to so far."""

    weights: Weights
    bank: StatsBank
    shift: TargetShift
    teacher: Teacher
    rounder: LayerRounder
    finished: MutableMapping[str, Any]  # the visits of blocks by their names, and gradients that wait for theirs
    num_blocks: int
    targets: dict[Site, Tensor] = field(default_factory=dict)  # of the layers whose chosen trial has moved theirs
    visits: dict[Site, str] = field(default_factory=dict)  # the latest that moved the targets of a layer, where none are kept
    waiting: dict[str, Mapping[Site, Tensor]] = field(default_factory=dict)  # gradients, by entry, where they are in memory
    num_ahead: int = 0  # of the blocks that follow, so many have their gradients already
    chosen: dict[str, _Trial] = field(default_factory=dict)  # by the block's first layer
    rows: list[dict[str, Any]] = field(default_factory=list)  # one for every trial
    loss: HeldoutLoss = NOT_ASKED  # of the model as it is

    @property
    def starts_rounded(self) -> bool:
        return self.shift.start == "rounded"

    def plain(self, block: Block) -> _Visit:
        """The block rounded to its own weights, without a gradient; the model as it was."""
        flags: list[str] = []
        draft = self.rounder.draft(block, flags)
        targets = {site: self.rounder.problems[site].target.float() for site in block}
        trial = _Trial(0.0, targets, draft.judged(), flags, loss=NOT_ASKED, first_order=0.0)
        return _Visit(trial, [_row(0, block, trial, norm=0.0, before=math.nan, chosen=True)])

    def visit(self, sweep: int, blocks: Sequence[Block]) -> _Visit:
        """Choose a step for the first of the blocks that are still to be visited, and leave the model as it is."""
        block, name = blocks[0], blocks[0][0].name
        untouched = not self.chosen and self.shift.source != "sft"  # nothing is quantised yet: any gradient is rounding noise
        gradient = {} if untouched else self._gradient(sweep, blocks)
        norm = _norm(gradient)
        others = range(self.shift.minibatches) if self.shift.minibatches > 1 and not untouched else ()
        for turn in others:
            if norm == 0:  # no sample of its minibatch reaches the block: a vision tower's, and none has an image
                ((_, gradient),) = self.teacher.gradients([block], turn)
                norm = _norm(gradient)
        if norm == 0 and not untouched:
            raise UserError(
                f"{name} and its block: the gradient is zero, so a gradient-aware compensation has nothing to go by; "
                "compensation=hessian does without."
            )
        steps = self.shift.steps[:1] if untouched else self.shift.steps[1:] if sweep else self.shift.steps
        if sweep and math.isnan(self.loss.mean):
            self.loss = self.teacher.heldout_loss()
        before = self.loss if sweep else NOT_ASKED
        with self.weights.unchanged(block) as present, factors_kept():
            tried, best, draft = list[_Trial](), None, None
            for trial, its_draft in self._trials(block, gradient, present, steps, before):
                tried.append(replace(trial, targets={}, rounded=Rounded()))  # two sets of layers are there at a time, no more
                if best is None or trial.loss.is_less_than(best.loss):
                    best, draft = trial, its_draft
                del trial, its_draft
        assert best is not None, "there is a step"
        assert draft is not None
        # The loss before is NaN in the first sweep: anything will do.
        improves = math.isfinite(best.loss.mean) and not best.loss.mean >= before.mean
        if not improves and not math.isfinite(before.mean):
            raise UserError(
                f"{name} and its block: the loss on the held-out samples is not finite, whatever step is taken. The model's "
                "answers leave the range of its dtype: set model.dtype=float32; or compensation=hessian, which asks for no loss."
            )
        rows = [_row(sweep, block, one, norm, before.mean, chosen=improves and one.step == best.step) for one in tried]
        if not improves:
            return _Visit(None, rows, before, self.num_ahead)
        return _Visit(replace(best, rounded=draft.judged()), rows, best.loss, self.num_ahead)

    def take_over(self, name: str, visit: _Visit, block: Block) -> None:
        """Go on behind the visit of that name: what it has chosen for the block is what the model has from here on."""
        self.rows += visit.rows
        self.num_ahead, self.loss = visit.num_ahead, visit.loss
        if (chosen := visit.chosen) is None:
            return
        self.teacher.model_changes()
        self.weights.install(chosen.rounded.decoded, chosen.rounded.stored)
        if self.weights.streamed:
            self.visits |= dict.fromkeys(chosen.targets, name)
            chosen = replace(chosen, targets={}, rounded=chosen.rounded.packed())
        self.targets |= chosen.targets
        self.chosen[block[0].name] = chosen

    def _gradient(self, sweep: int, blocks: Sequence[Block]) -> Mapping[Site, Tensor]:
        """Of the first block: from full precision, or left by an earlier pass, or from a pass over as many as go together.

        Raises SharedFault where one that was left cannot be read back, because it could not be written, say.
        """
        if not self.shift.refresh:
            return {site: gradient for site in blocks[0] if (gradient := self.bank[site].gradient) is not None}
        if self.num_ahead:
            self.num_ahead -= 1
            return self._left(_entry(sweep, blocks[0]))
        together, found = blocks[: int(self.shift.refresh)], dict[Site, Tensor]()
        for block, gradient in self.teacher.gradients(together, self._turn(sweep, blocks)):  # the first block comes last
            if block == blocks[0]:
                found = gradient
            else:
                self._leave(_entry(sweep, block), gradient)
        self.num_ahead = len(together) - 1
        return found

    def _turn(self, sweep: int, blocks: Sequence[Block]) -> int:
        """Which minibatch is next, told by the sweep and the first of these blocks, which follow each other to the end: a loop
        that goes on comes to the same."""
        in_turn = -(-self.num_blocks // int(self.shift.refresh))
        return sweep * in_turn + (self.num_blocks - len(blocks)) // int(self.shift.refresh)

    def _leave(self, entry: str, gradient: Mapping[Site, Tensor]) -> None:
        """Keep it until its block is visited, in memory too unless that is scarce."""
        self.finished[entry] = gradient
        if not self.weights.streamed:
            self.waiting[entry] = gradient

    def _left(self, entry: str) -> Mapping[Site, Tensor]:
        gradient = self.waiting.pop(entry) if entry in self.waiting else self.finished.get(entry)
        if gradient is not None:
            return gradient
        raise SharedFault(
            f"{entry} cannot be read back, a gradient that was taken with those of the blocks before: make room in the results "
            "folder, or set memory=resident or compensation.refresh=true."
        )

    def _trials(
        self,
        block: Block,
        gradient: Mapping[Site, Tensor],
        present: Mapping[Site, Tensor],
        steps: Sequence[float],
        before: HeldoutLoss,
    ) -> Iterator[tuple[_Trial, Draft]]:
        """Step after step, as far as the quadratic model leads (`_leads_on`), with what the errors can be found from."""
        last, least = _Point(0.0, before.mean, 0.0), before
        earlier = self._earlier_targets(block)
        aims = {site: self._aim(site, gradient.get(site), present, earlier.get(site)) for site in block}
        del earlier
        for step, larger in zip(steps, [*steps[1:], None], strict=True):
            targets = {site: self.teacher.put(aim.moved(step)) for site, aim in aims.items()}
            flags: list[str] = []
            rounder, name = self.rounder, "feedback"
            if step:  # a refit moves the tables anyway, to where the codes of the moved target want them
                rounder, name = rounder.with_targets(targets, fit=rounder.refit is None), "shifted"
            draft = rounder.draft(block, flags, name)
            rounded = draft.rounded
            self.weights.install(rounded.decoded, rounded.stored)
            first_order = sum(
                (float((g * (rounded.decoded[site] - present[site].float()).cpu()).sum()) for site, g in gradient.items()), 0.0
            )
            promised = sum((aim.promised(targets[site]) for site, aim in aims.items()), 0.0)
            loss = self.teacher.heldout_loss(self._race(least))
            here = _Point(step, loss.mean, promised)
            yield _Trial(step, targets, rounded, flags, loss, first_order), draft
            if larger is None or not _leads_on(last, here, larger):
                return
            if math.isfinite(here.loss):
                last = here
            if loss.is_less_than(least):
                least = loss
            del targets, rounder, draft, rounded  # while the next trial is made

    def _race(self, least: HeldoutLoss) -> Race | None:
        return Race(least, self.shift.racing) if self.shift.racing is not None and math.isfinite(least.mean) else None

    def _earlier_targets(self, block: Block) -> Mapping[Site, Tensor]:
        """What the layers of the block were rounded to in earlier sweeps.

        Raises SharedFault where a finished block cannot be read back, because it could not be written, say.
        """
        found = dict(self.targets)
        for name in {self.visits[site] for site in block if site in self.visits}:
            if (visit := self.finished.get(name)) is None:
                raise SharedFault(
                    f"{name} cannot be read back, which holds the targets of an earlier sweep: make room in the results folder, "
                    "or set memory=resident or compensation.sweeps=1."
                )
            found |= visit.chosen.targets
        return found

    def _aim(self, site: Site, gradient: Tensor | None, present: Mapping[Site, Tensor], earlier: Tensor | None) -> "_Aim":
        problem = self.rounder.problems[site]
        assert problem.metric is not None, "the method's checks ask for a metric"
        target = problem.target
        if gradient is None:
            return _Aim(self.shift, problem.metric, target, None, self.teacher.put)
        gradient = gradient.to(target.device)
        if problem.transform:
            gradient = problem.transform.weight(gradient)
            assert gradient is not None, "a transform gives a weight for a weight"
        if earlier is not None:  # an earlier sweep has rounded it, with an error that the gradient knows
            target = earlier.to(target.device)  # one that was read back is on the CPU
            gradient = without_own_error(gradient, problem.metric, problem.of_model(present[site]) - target)
        return _Aim(self.shift, problem.metric, self.teacher.put(target), self.teacher.put(gradient), self.teacher.put)


@dataclass(frozen=True)
class _Aim:
    """What a layer's target is moved from, and by which gradient there, in the basis of its problem."""

    shift: TargetShift
    metric: Metric
    target: Tensor
    gradient: Tensor | None  # None: it is not moved
    put: Callable[[Tensor], Tensor]  # to where what waits for other trials is kept

    @cached_property
    def _direction(self) -> Tensor:
        assert self.gradient is not None
        return self.put(self.shift.direction(self.metric, self.gradient))

    def moved(self, step: float) -> Tensor:
        """The target that a step leads to, float32."""
        still = self.gradient is None or step == 0
        return self.target.float() if still else self.shift.target(self.target, self._direction, step)

    def promised(self, moved: Tensor) -> float:
        """The change of the loss that the gradient promises for the moved target, to first order."""
        return 0.0 if self.gradient is None else float((self.gradient * (moved - self.target.float())).sum())
