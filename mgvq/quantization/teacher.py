"""How far a half-quantised model has drifted from full precision: gradients on calibration samples, losses on held-out ones."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from mgvq.errors import UserError
from mgvq.model.answers import answer_logits, answer_states, logits
from mgvq.model.pack import PackedBatch
from mgvq.model.passes import forward, right_labels
from mgvq.model.replay import Replay
from mgvq.types import Batch, Site

AnyBatch = Batch | PackedBatch


@dataclass
class _TeacherBatch:
    """Of one batch at full precision: what the head reads for the answers, and outputs of blocks by name with tokens' weights.

    The head is no site and stays as it is, and its output would be larger by the vocabulary over the width.
    """

    states: Float[Tensor, "answers hidden"]
    blocks: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Teacher:
    """Keeps what the model as it is when this is made says: the teacher.

    `source` of the gradients, all in nats an answer token: `kl`, the divergence of the answers from the teacher's; `sft`, the
    loss of the right answers; `block`, `1/2 sum_t |g_t|^2 |h_t - h_t^teacher|^2 / dim` of a block's output h, g the gradient of
    the right answers' summed loss with respect to it: the divergence as it would be were the drift of a token in no special
    direction. Held-out losses are of the right answers for `sft`, and divergences for the others.

    `batches` for gradients and `heldout` for losses must share no sample. Raises UserError where there is no held-out sample.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        batches: Iterable[AnyBatch],
        heldout: Iterable[AnyBatch],
        source: str,
    ) -> None:
        self.model, self.source = model, source
        self.batches, self.heldout = ([_moved(b, model) for b in part] for part in (batches, heldout))
        if not self.heldout:
            raise UserError(
                "the step of the gradient is chosen on held-out samples, and there are none: raise calibration.heldout_images."
            )
        if both := {i for b in self.batches for i in b.sample_ids} & {i for b in self.heldout for i in b.sample_ids}:
            raise AssertionError(f"samples of the gradient are held out: {sorted(both)[:3]}")
        with torch.inference_mode():
            with _called_before(model, sites) as static_modules:
                self._logs(self.heldout[-1])  # the one with the most images: the first may have none
            self._teacher, self._heldout_teacher = (
                [_TeacherBatch(answer_states(model, b)) for b in part] for part in (self.batches, self.heldout)
            )
        names = [block_name(block[0]) for block in by_block(sites)]
        self._replay = Replay(model, [*([name] for name in static_modules), *_rows(sites)])
        for name in static_modules:
            self._replay.settle(name)
        if source == "block":
            for batch, teacher in zip(self.batches, self._teacher, strict=True):
                teacher.blocks = self._blocks(names, sites, batch)

    def settle(self, block: Sequence[Site]) -> None:
        """The block's weights, and those of all blocks before it, stay as they are until `unsettle`: passes start behind it."""
        if block[0].block is not None:
            self._replay.settle(block_name(block[0]))

    def unsettle(self) -> None:
        """All blocks may change again."""
        self._replay.unsettle()

    def gradient(self, sites: Sequence[Site]) -> Mapping[Site, Float[Tensor, "_ _"]]:
        """Of the mean loss an answer token with respect to the weights of `sites`, at the model's present weights.

        `sites` are those of one block, or of several that follow each other where the source is not `block`.
        """
        sums = {site: torch.zeros(site.out_features, site.in_features, dtype=torch.float64) for site in sites}
        num_answers = 0
        for number, (batch, teacher) in enumerate(zip(self.batches, self._teacher, strict=True)):
            watched = [block_name(sites[0])] if self.source == "block" else []
            with self._replay(number), _outputs(self.model, watched) as outputs:
                run = forward(self.model, sites, batch, lambda *_: None, graph=True)
            if self.source == "block":
                loss = torch.zeros((), device=self.model.device)
                for name, output in outputs.items():  # none for a block of the vision tower where the batch has no image
                    expected, weight = teacher.blocks[name]
                    loss = loss + 0.5 * (weight * (output - expected).square().mean(-1)).sum()
            else:
                loss = self._loss(run.logs, batch, teacher).sum()
            num_answers += len(run.logs)
            for site, g in run.backward(loss, last=True).items():
                sums[site] += (g.flatten(0, -2).T @ run.inputs[site.reads].flatten(0, -2)).double().cpu()
        return {site: (total / max(1, num_answers)).float() for site, total in sums.items()}

    @torch.inference_mode()
    def heldout_loss(self) -> float:
        """Mean over the answer tokens of the held-out samples."""
        losses = []
        for number, (batch, teacher) in enumerate(zip(self.heldout, self._heldout_teacher, strict=True)):
            with self._replay(("heldout", number)):
                losses.append(self._loss(self._logs(batch), batch, teacher))
        return float(torch.cat(losses).double().mean())

    def _logs(self, batch: AnyBatch) -> Float[Tensor, "answers vocabulary"]:
        return answer_logits(self.model, batch).log_softmax(-1)

    def _loss(self, logs: Tensor, batch: AnyBatch, teacher: _TeacherBatch) -> Float[Tensor, "answers"]:
        if self.source == "sft":
            return -logs.gather(1, right_labels(batch)[:, None])[:, 0]
        with torch.no_grad():
            expected = logits(self.model, teacher.states).log_softmax(-1)
        return (expected.exp() * (expected - logs)).sum(-1)

    def _blocks(self, names: Sequence[str], sites: Sequence[Site], batch: AnyBatch) -> dict[str, tuple[Tensor, Tensor]]:
        firsts = list({site.tower: site for site in reversed(sites)}.values())  # the graph starts at one of these
        with _outputs(self.model, names) as outputs:
            run = forward(self.model, firsts, batch, lambda *_: None, graph=True)
        loss = -run.logs.gather(1, right_labels(batch)[:, None]).sum()
        found = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True, materialize_grads=True)
        weights = (gradient.square().sum(-1) for gradient in found)
        return {name: (output.detach(), weight) for (name, output), weight in zip(outputs.items(), weights, strict=True)}


@contextmanager
def _outputs(model: PreTrainedModel, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What the modules of these names put out while this is open, by name."""
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[..., None]:
        def keep(_module: torch.nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return keep

    handles = [model.get_submodule(name).register_forward_hook(keeper(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _moved(batch: AnyBatch, model: PreTrainedModel) -> AnyBatch:
    return batch.to(model.device, model.dtype) if isinstance(batch, PackedBatch) else batch.to(model.device)


def by_block(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """The sites of one block at a time, in order; a site outside the blocks is a block of its own."""
    block: list[Site] = []
    for site in sites:
        same = block and site.block is not None and (site.tower, site.block) == (block[0].tower, block[0].block)
        if block and not same:
            yield block
            block = []
        block.append(site)
    if block:
        yield block


def _rows(sites: Sequence[Site]) -> list[list[str]]:
    """The names of the blocks, tower by tower."""
    rows: dict[str, list[str]] = {}
    for block in by_block(sites):
        if block[0].block is not None:
            rows.setdefault(block[0].tower, []).append(block_name(block[0]))
    return list(rows.values())


@contextmanager
def _called_before(model: PreTrainedModel, sites: Sequence[Site]) -> Iterator[list[str]]:
    """Filled by the forward pass inside: the modules that the model is made of (towers, say) and that ran before any site."""
    base = model.base_model
    prefix = next(name for name, module in model.named_modules() if module is base)
    calls: list[str] = []
    before: list[str] = []
    handles = [model.get_submodule(s.name).register_forward_pre_hook(lambda *_: calls.append("")) for s in sites]
    parts = {f"{prefix}.{name}": part for name, part in base.named_children()}
    handles += [part.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, part in parts.items()]
    try:
        yield before
    finally:
        for handle in handles:
            handle.remove()
    first = calls.index("") if "" in calls else 0
    before += [name for name in dict.fromkeys(calls[:first]) if name not in calls[first:]]


def block_name(site: Site) -> str:
    """The module that holds the block of a site: its name up to the block's number; a site outside the blocks is one itself."""
    parts = site.name.split(".")
    return site.name if site.block is None else ".".join(parts[: parts.index(str(site.block)) + 1])
