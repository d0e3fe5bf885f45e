"""The full-precision model as a teacher: gradients of the divergence from it, and losses on held-out samples."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from shutil import disk_usage

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.errors import UserError
from mgvq.memory import in_file
from mgvq.model.answers import answer_states, answers_by_sample, logits, logs_in_runs, vocabulary_of
from mgvq.model.blocks import Block, block_name, by_block
from mgvq.model.hooks import BeforeForward, before_forward, outputs_of
from mgvq.model.passes import LossOf, back, forward, right_losses, seen, through_head
from mgvq.model.relay import Boundaries, Relay, relays
from mgvq.model.walk import AnyBatch, BlockWalk, on_device
from mgvq.quantization.race import HeldoutLoss, Race, by_sample, heats
from mgvq.quantization.subject import Subject
from mgvq.types import Site

_IN_MEMORY = 2**28  # log-probabilities, a gigabyte: of a large vocabulary a few thousand answer tokens
_IN_FILES = 2**31  # eight gigabytes


@dataclass
class _Taught:
    """What the full-precision model says about one batch.

    The head is no site and stays as it is, so its inputs are kept: its outputs take the vocabulary over the width as much, and
    are kept where there is room.
    """

    states: Float[Tensor, "answers hidden"]  # what the head reads for the answers
    # Log-probabilities, by where their run of answers starts; a run that is not there is computed whenever it is needed.
    logs: dict[int, Float[Tensor, "few vocabulary"]] = field(default_factory=dict)
    blocks: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by block: its output, and the weight of every token


class _Sums:
    """The sums over batches of the gradients of the weights of a block, or of several."""

    def __init__(self, block: Block) -> None:
        self.num_answers = 0
        self.sums = {site: torch.zeros(site.out_features, site.in_features, dtype=torch.float64) for site in block}

    def see(self, number: int, site: Site, inputs: Tensor) -> None:
        """Nothing is made of inputs alone."""

    def add(self, number: int, kind: str, site: Site, inputs: Tensor, gradient: Tensor) -> None:
        self.sums[site] += _of_weight(inputs, gradient)


def _of_weight(inputs: Float[Tensor, "... in"], gradient: Float[Tensor, "... out"]) -> Float[Tensor, "out in"]:
    return (gradient.flatten(0, -2).T @ inputs.flatten(0, -2)).double().cpu()


@contextmanager
def _calls(model: torch.nn.Module, names: Sequence[str]) -> Iterator[Counter[str]]:
    """How often each of the modules is called."""
    found = Counter[str]()

    def counted(name: str) -> BeforeForward:
        return lambda *_: found.update([name])

    with before_forward(model, {name: counted(name) for name in names}):
        yield found


class Teacher:
    """Keeps what the model says at the time when this is made; the model may then be quantised block by block.

    `source` of the gradients, all in nats an answer token: `kl`, the divergence of the answers from the teacher's; `sft`, the
    loss of the right answers; `block`, `1/2 sum_t |g_t|^2 |h_t - h_t^teacher|^2 / dim` of a block's output h, where g is the
    gradient of the right answers' summed loss with respect to it: the divergence of the answers if the drift of a token pointed
    in no special direction (docs/method.md, eq. (block-drift)). Held-out losses are of the right answers for `sft`, and
    divergences for the others.

    The batches of the samples are dealt to so many `minibatches`; gradients take these in turn.

    Where the samples have a folder, files in it hold log-probabilities of the model, else memory does, and fewer of them.
    `relayed`: gradients go from block to block, and those files hold activations too, else they take passes with a graph through
    all blocks; None: where the weights are streamed. Raises UserError where there is no held-out sample.
    """

    def __init__(self, subject: Subject, source: str, *, minibatches: int = 1, relayed: bool | None = None) -> None:
        model, sites, weights, ranks = subject.model, subject.sites, subject.weights, subject.ranks
        self.model, self.source, self._ranks, self._folder = model, source, ranks, subject.samples.folder
        self._aside = aside = self._folder if (weights.streamed if relayed is None else relayed) else None
        self._by_block: list[Block] = list(by_block(sites))
        # Gradients with respect to what a block puts out, by its name and the number of the own batch, of the model as it is.
        self._at_ends: dict[tuple[str, int], Tensor] = {}
        batches, heldout = subject.samples.batches, subject.samples.heldout
        if not heldout:
            raise UserError(
                "the step of the gradient is chosen on held-out samples, and there are none: raise calibration.heldout_images."
            )
        if both := {i for b in batches for i in b.sample_ids} & {i for b in heldout for i in b.sample_ids}:
            raise AssertionError(f"samples of the gradient are held out: {sorted(both)[:3]}")
        self._num_heldout = len(heldout)
        self._places = {number: place for place, number in enumerate(ranks.share(range(len(heldout))))}  # of the own batches
        self._minibatches = min(minibatches, max(1, len(batches)))
        self._minibatch_of = [number % self._minibatches for number in ranks.share(range(len(batches)))]  # own batches
        self.batches, self.heldout = ([on_device(b, model) for b in ranks.share(part)] for part in (batches, heldout))
        self._heldout_walk = BlockWalk(model, sites, self.heldout, weights, on_device(heldout[-1], model), aside=aside)
        self._walk = BlockWalk(model, sites, self.batches, weights, like=self._heldout_walk, aside=aside)
        with torch.inference_mode():
            self._taught, self._taught_heldout = (
                [_Taught(self._walk.put(answer_states(model, b))) for b in part] for part in (self.batches, self.heldout)
            )
            if source != "sft":
                self._keep_logs()
        if source == "block":
            for batch, taught in zip(self.batches, self._taught, strict=True):
                taught.blocks = self._blocks(sites, batch)

    def _keep_logs(self) -> None:
        """Of the held-out samples first, which are looked at most often."""
        folder = self._folder if self.model.device.type == "cpu" else None
        room = self._room(folder) // vocabulary_of(self.model)
        for taught in (*self._taught_heldout, *self._taught):
            if len(taught.states) > room:
                return
            room -= len(taught.states)
            for few, logs in logs_in_runs(self.model, taught.states):
                taught.logs[few.start] = logs if folder is None else in_file(logs, folder)

    def _room(self, folder: Path | None) -> int:
        """How many log-probabilities are kept, of 4 bytes each: in files at most a quarter of what the disk has free."""
        if folder is None:
            return 0 if self._aside is not None else _IN_MEMORY
        folder.mkdir(parents=True, exist_ok=True)
        return min(_IN_FILES, disk_usage(folder).free // 16)

    def _expected(self, taught: _Taught, few: slice) -> Float[Tensor, "few vocabulary"]:
        kept = taught.logs.get(few.start)
        return logits(self.model, taught.states[few]).log_softmax(-1) if kept is None else kept

    def put(self, values: Tensor) -> Tensor:
        """The same numbers where what streamed passes put aside is (`BlockWalk.put`)."""
        return self._walk.put(values)

    def model_changes(self) -> None:
        """The weights are others from here on: what was kept behind blocks is of no use."""
        self._at_ends.clear()

    def settle(self, block: Block) -> None:
        """The block's weights, and those of all blocks before it, stay as they are until `unsettle`: passes start behind it."""
        for walk in (self._walk, self._heldout_walk):
            walk.settle(block)

    def unsettle(self) -> None:
        """All blocks may change again."""
        for walk in (self._walk, self._heldout_walk):
            walk.unsettle()

    def _turn(self, turn: int) -> list[int]:
        """The numbers of the own batches whose turn it is."""
        return [number for number, minibatch in enumerate(self._minibatch_of) if minibatch == turn % self._minibatches]

    def gradients(self, blocks: Sequence[Block], turn: int = 0) -> Iterator[tuple[Block, Mapping[Site, Float[Tensor, "_ _"]]]]:
        """`gradient` of blocks that follow each other, from the last to the first; nothing else may run the model meanwhile.

        Where there is a folder to put activations aside, one block at a time is in memory, with its sums; the bits are the same.
        """
        row = self._rest_of_tower(blocks[0]) if self._aside is not None and self.source != "block" else []
        if self._aside is None or blocks[-1] not in row or not relays(self._walk, row):
            found = self._carried_on(blocks) or self.gradient([s for block in blocks for s in block], turn, self._ends(blocks))
            yield from ((block, {site: found[site] for site in block}) for block in reversed(blocks))
            return
        numbers = self._turn(turn)
        num_answers = sum(self._ranks.gather("answers", sum(len(self._taught[number].states) for number in numbers)))

        def losses(batch: AnyBatch, taught: _Taught) -> Mapping[str, LossOf]:
            return {self.source: self._losses(batch, taught)}

        asked = {number: partial(losses, self.batches[number], self._taught[number]) for number in numbers}
        with Boundaries(self._aside, self._ranks) as boundaries:
            for block, received in Relay(self._walk, row, boundaries).received(asked, blocks, _Sums):
                sums = self._ranks.total("gradient", received.sums)
                del received
                yield block, {site: self.put((sums.pop(site) / max(1, num_answers)).float()) for site in block}

    def _ends(self, blocks: Sequence[Block]) -> list[str]:
        """The last block of each that gradients will be asked for together next, as many at a time as these; none where they will
        be of another loss or other samples, or memory is scarce."""
        if self.source == "block" or self._minibatches > 1 or self._aside is not None:
            return []
        behind = self._by_block[self._by_block.index(blocks[-1]) + 1 :]
        return [block_name(behind[first : first + len(blocks)][-1]) for first in range(0, len(behind), len(blocks))]

    def _carried_on(self, blocks: Sequence[Block]) -> Mapping[Site, Float[Tensor, "_ _"]] | None:
        """`gradient` of the blocks by passes through them alone, from what an earlier pass has found behind them; None where the
        model is another one since, or nothing was kept.

        The operations are those of a pass through all that follows, and so are the bits.
        """
        end, sites = block_name(blocks[-1]), [site for block in blocks for site in block]
        if not self._at_ends or any((end, number) not in self._at_ends for number in range(len(self._taught))):
            return None
        sums = _Sums(sites)
        for number, taught in enumerate(self._taught):
            with outputs_of(self.model, [end]) as outputs, seen(self.model, sites, lambda *_: None, graph=True) as at_sites:
                self._walk.run_through(number, end)
            found = back([outputs[end]], [self._at_ends[end, number]], list(at_sites.outputs.values()), last=True)
            for site, gradient in zip(at_sites.outputs, found, strict=True):
                sums.add(number, self.source, site, at_sites.inputs[site.reads], gradient.float())
            sums.num_answers += len(taught.states)
        return self._mean(sums)

    def _rest_of_tower(self, block: Block) -> list[Block]:
        """The block and those of its tower behind it."""
        place = self._by_block.index(block)
        return [other for other in self._by_block[place:] if other[0].tower == block[0].tower]

    def gradient(self, sites: Sequence[Site], turn: int = 0, ends: Sequence[str] = ()) -> Mapping[Site, Float[Tensor, "_ _"]]:
        """The gradient of the mean loss an answer token with respect to the weights of `sites`, at the model's present weights.

        It is of the minibatch whose `turn` it is, counted round and round. `sites` are those of one block, or of several that
        follow each other where the source is not `block`. The gradients with respect to what the blocks `ends` put out are kept
        until `model_changes`, where there is room.
        """
        sums = _Sums(sites)
        watched = [block_name(sites)] if self.source == "block" else ends
        self._at_ends.clear()
        for number in self._turn(turn):
            taught = self._taught[number]
            with (
                self._walk.passing(number) as batch,
                outputs_of(self.model, watched) as outputs,
                _calls(self.model, ends) as calls,
            ):
                run = forward(self.model, sites, batch, lambda *_: None, graph=True)
            sums.num_answers += len(run.states)
            if self.source == "block":
                loss = torch.zeros((), device=self.model.device)
                for name, output in outputs.items():  # none for a block of the vision tower where the batch has no image
                    expected, weight = taught.blocks[name]
                    loss = loss + 0.5 * (weight * (output - expected).square().mean(-1)).sum()
                gradients = run.backward(loss)
            else:
                once = [end for end in outputs if calls[end] == 1]
                (at_states,) = through_head(self.model, run.states, {self.source: self._losses(batch, taught)}).values()
                asked = [*run.outputs.values(), *(outputs[end] for end in once)]
                found = back([run.states], [at_states], asked, last=True)
                gradients = {site: gradient.float() for site, gradient in zip(run.outputs, found, strict=False)}
                self._at_ends |= {(end, number): found[len(gradients) + place] for place, end in enumerate(once)}
            for site, gradient in gradients.items():
                sums.add(number, self.source, site, run.inputs[site.reads], gradient)
            if sum(map(torch.numel, self._at_ends.values())) > _IN_MEMORY:
                self._at_ends, ends = {}, ()
        return self._mean(sums)

    def _mean(self, sums: _Sums) -> Mapping[Site, Float[Tensor, "_ _"]]:
        num_answers = sum(self._ranks.gather("answers", sums.num_answers))
        totals = self._ranks.total("gradient", sums.sums)
        return {site: (total / max(1, num_answers)).float() for site, total in totals.items()}

    def heldout_loss(self, race: Race | None = None) -> HeldoutLoss:
        """The mean loss over the answer tokens of the held-out samples; in a race it is an estimate where a part of the samples
        shows it to be worse than the rival's."""
        losses: dict[int, tuple[Tensor, Sequence[int]]] = {}
        for heat in heats(self._num_heldout):
            own = {number: self._heldout_losses(number) for number in heat if number in self._places}
            for of_rank in self._ranks.gather("held-out losses", own):
                losses |= of_rank
            if race is None or len(losses) == self._num_heldout:
                continue
            estimate = race.given_up({number: by_sample(*one) for number, one in sorted(losses.items())})
            if estimate is not None:
                return estimate
        ordered = dict(sorted(losses.items()))
        mean = float(torch.cat([loss for loss, _ in ordered.values()]).double().mean())
        return HeldoutLoss(mean, {number: by_sample(*one) for number, one in ordered.items()})

    @torch.inference_mode()
    def _heldout_losses(self, number: int) -> tuple[Float[Tensor, "answers"], list[int]]:
        """Of the held-out batch of that number, one of this process's own: the losses of its answer tokens, and how many of them
        each sample has."""
        place = self._places[number]
        taught = self._taught_heldout[place]
        with self._heldout_walk.passing(place) as batch:
            states = answer_states(self.model, batch)
        loss_of = self._losses(batch, taught)
        losses = torch.cat([loss_of(logs, few) for few, logs in logs_in_runs(self.model, states)])
        return losses, answers_by_sample(batch)

    def _losses(self, batch: AnyBatch, taught: _Taught) -> LossOf:
        if self.source == "sft":
            return right_losses(batch)

        def divergence(logs: Float[Tensor, "few vocabulary"], few: slice) -> Float[Tensor, "few"]:
            with torch.no_grad():
                expected = self._expected(taught, few)
            return (expected.exp() * (expected - logs)).sum(-1)

        return divergence

    def _blocks(self, sites: Sequence[Site], batch: AnyBatch) -> dict[str, tuple[Tensor, Tensor]]:
        names = [block_name(block) for block in by_block(sites)]
        firsts = list({site.tower: site for site in reversed(sites)}.values())  # the graph starts at one of these
        with outputs_of(self.model, names) as outputs:
            run = forward(self.model, firsts, batch, lambda *_: None, graph=True)
        (gradient,) = through_head(self.model, run.states, {"right": right_losses(batch)}).values()
        found = back([run.states], [gradient], list(outputs.values()), last=True)
        weights = (gradient.square().sum(-1) for gradient in found)
        return {name: (output.detach(), weight) for (name, output), weight in zip(outputs.items(), weights, strict=True)}
