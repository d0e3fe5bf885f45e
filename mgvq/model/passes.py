"""A forward pass that sees what goes through the sites, and the backward passes from its answers."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.errors import UserError
from mgvq.model.answers import answer_states, logits, runs_of_answers, vocabulary_of
from mgvq.model.hooks import after_forward
from mgvq.model.pack import PackedBatch
from mgvq.rng import generator
from mgvq.types import Batch, Modality, Site


@dataclass
class Seen:
    """What a pass has left at the sites: inputs by `Site.reads`, and outputs by site (of the sites that were called)."""

    inputs: dict[str, Float[Tensor, "... in"]] = field(default_factory=dict)
    outputs: dict[Site, Float[Tensor, "... out"]] = field(default_factory=dict)


LossOf = Callable[[Float[Tensor, "few vocabulary"], slice], Float[Tensor, "few"]]
"""The losses of a run of answer tokens from their log-probabilities, and from where among the answers of the batch they are."""


@dataclass(frozen=True)
class Forward:
    """What a batch left behind: inputs by `Site.reads` and outputs by site (of the sites that were called), both for `gradients`.

    `states`: what the head reads at the positions that predict the answer tokens, row by row.
    """

    model: torch.nn.Module
    inputs: Mapping[str, Float[Tensor, "... in"]]
    outputs: Mapping[Site, Float[Tensor, "... out"]]
    states: Float[Tensor, "answers hidden"]

    def gradients(self, losses: Mapping[str, LossOf]) -> Iterator[tuple[str, dict[Site, Float[Tensor, "... out"]]]]:
        """For each of the losses, all answers together, its gradients with respect to every site's output."""
        at_states = through_head(self.model, self.states, losses)
        for number, (kind, gradient) in enumerate(at_states.items(), start=1):
            found = back([self.states], [gradient], list(self.outputs.values()), last=number == len(at_states))
            yield kind, {site: own.float() for site, own in zip(self.outputs, found, strict=True)}

    def backward(self, loss: Float[Tensor, ""]) -> dict[Site, Float[Tensor, "... out"]]:
        """The same of a loss that is computed from something else than the answers; its graph is gone afterwards."""
        found = back([loss], [torch.ones_like(loss)], list(self.outputs.values()), last=True)
        return {site: own.float() for site, own in zip(self.outputs, found, strict=True)}


def through_head(
    model: torch.nn.Module, states: Float[Tensor, "answers hidden"], losses: Mapping[str, LossOf]
) -> dict[str, Float[Tensor, "answers hidden"]]:
    """The gradients of losses with respect to what the head reads, a run of answers at a time."""
    found = {kind: torch.zeros_like(states, requires_grad=False) for kind in losses}
    if not losses:
        return found
    with torch.enable_grad():
        for few in runs_of_answers(len(states), vocabulary_of(model)):
            leaf = states[few].detach().requires_grad_()
            logs = logits(model, leaf).log_softmax(-1)
            for number, (kind, loss_of) in enumerate(losses.items(), start=1):
                (found[kind][few],) = torch.autograd.grad(loss_of(logs, few).sum(), [leaf], retain_graph=number < len(losses))
    return found


def back(of: Sequence[Tensor], gradients: Sequence[Tensor], asked: Sequence[Tensor], *, last: bool) -> Sequence[Tensor]:
    """The gradients with respect to `asked`, from those of what was computed from them; `last` frees the graph.

    Zeros where nothing was: for a layer whose output nobody uses (a vision tower's last block, say).
    """
    if not asked:  # sites of the vision tower, and no image in the batch
        return []
    if not any(one.requires_grad for one in of):
        return [torch.zeros_like(one) for one in asked]
    return torch.autograd.grad(
        list(of), list(asked), list(gradients), retain_graph=not last, allow_unused=True, materialize_grads=True
    )


def forward(
    model: torch.nn.Module,
    sites: Sequence[Site],
    batch: Batch | PackedBatch,
    see: Callable[[Site, Tensor], object],
    *,
    graph: bool,
) -> Forward:
    """Run the batch as far as the head, its sites `seen`."""
    with seen(model, sites, see, graph=graph) as at_sites:
        states = answer_states(model, batch)
    return Forward(model, at_sites.inputs, at_sites.outputs, states)


@contextmanager
def seen(model: torch.nn.Module, sites: Sequence[Site], see: Callable[[Site, Tensor], object], *, graph: bool) -> Iterator[Seen]:
    """Stands around a forward pass. `see` gets every site's input in float32, once for the sites that read the same.

    Without `graph` nothing else is kept. With it the graph starts at the first sites' outputs: a weight's gradient is a sum of
    products of inputs and output gradients, so no parameter has to require one. Raises RuntimeError where sites of one `reads`
    get different tensors.
    """
    kept = Seen()
    readers: dict[str, tuple[Site, weakref.ref[Tensor]]] = {}  # weak: the activations themselves need not stay

    def hook(site: Site) -> Callable[..., None]:
        def record(_: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            first, tensor = readers.setdefault(site.reads, (site, weakref.ref(args[0])))
            if tensor() is not args[0]:
                raise RuntimeError(f"{first.name} and {site.name} are said to read the same ({site.reads}), but do not.")
            if first is site:
                x = args[0].detach().float()
                see(site, x)
                if graph:
                    kept.inputs[site.reads] = x
            if graph:
                kept.outputs[site] = output if output.requires_grad else output.requires_grad_()

        return record

    with after_forward(model, {s.name: hook(s) for s in sites}), torch.enable_grad() if graph else torch.inference_mode():
        yield kept


def right_labels(batch: Batch | PackedBatch) -> Int[Tensor, "answers"]:
    """The answer tokens, row by row."""
    return batch.inputs["input_ids"][batch.loss_mask]


def right_losses(batch: Batch | PackedBatch) -> LossOf:
    """The cross-entropy of the answers."""
    return _losses_of(right_labels(batch))


def sampled_losses(batch: Batch, seed: int) -> LossOf:
    """The cross-entropy of labels that are drawn from the model (`sampled_labels`)."""
    draws = _draws(batch, seed)

    def loss(logs: Float[Tensor, "few vocabulary"], few: slice) -> Float[Tensor, "few"]:
        return _losses_of(_drawn(logs, draws[few]))(logs, slice(None))

    return loss


def _losses_of(labels: Int[Tensor, "answers"]) -> LossOf:
    return lambda logs, few: -logs.gather(1, labels[few][:, None])[:, 0]


def sampled_labels(logs: Float[Tensor, "answers vocabulary"], batch: Batch, seed: int) -> Int[Tensor, "answers"]:
    """A draw from the model at every answer position, by inversion. Every sample has its own stream: batches do not matter.

    Raises UserError, with the sample, where the model's predictions are no numbers.
    """
    if logs.isnan().any():
        sizes = batch.loss_mask.sum(1).tolist()
        bad = next(n for n, own in zip(batch.sample_ids, logs.split(sizes), strict=True) if own.isnan().any())
        raise UserError(f"{bad}: the model's predictions are NaN or infinite: set model.dtype=float32, or leave the sample out.")
    return _drawn(logs, _draws(batch, seed))


def _draws(batch: Batch, seed: int) -> Float[Tensor, "answers 1"]:
    return torch.cat(
        [
            torch.rand(size, 1, generator=generator(seed, "labels", name), dtype=torch.float64)
            for size, name in zip(batch.loss_mask.sum(1).tolist(), batch.sample_ids, strict=True)
        ]
    )


def _drawn(logs: Float[Tensor, "answers vocabulary"], draws: Float[Tensor, "answers 1"]) -> Int[Tensor, "answers"]:
    ladder = logs.detach().double().exp().cumsum(-1)
    return torch.searchsorted(ladder, draws.to(ladder.device) * ladder[:, -1:])[:, 0]


@dataclass(frozen=True)
class Rows:
    """Which rows of an activation are which tokens. Padding is nobody's; vision tower and projector see images alone."""

    batch: Batch
    places: Mapping[Modality, Int[Tensor, "tokens"]]  # of the language tower, in the flattened batch

    @classmethod
    def of(cls, batch: Batch) -> "Rows":
        """Find them."""
        masks: dict[Modality, Tensor] = {"image": batch.image_mask, "text": batch.valid_mask & ~batch.image_mask}
        return cls(batch, {m: mask.flatten().nonzero()[:, 0] for m, mask in masks.items()})

    def by_modality(self, site: Site, values: Float[Tensor, "... c"]) -> dict[Modality, Float[Tensor, "tokens c"]]:
        flat = values.flatten(0, -2)
        if site.tower != "language":
            return {"image": flat}
        return {m: flat.index_select(0, places) for m, places in self.places.items()}

    def all(self, site: Site, values: Float[Tensor, "... c"]) -> Float[Tensor, "tokens c"]:
        return torch.cat(list(self.by_modality(site, values).values()))

    def by_sample(self, site: Site, values: Float[Tensor, "rows *tokens c"]) -> list[Float[Tensor, "tokens c"]]:
        if site.tower == "language":
            return [v[valid] for v, valid in zip(values, self.batch.valid_mask, strict=True)]
        return [v.flatten(0, -2) for v in values.split(self._tiles(len(values)))]

    def _tiles(self, rows: int) -> list[int]:
        """How many rows of the vision tower each sample has: its image's tiles, one after the other, sample by sample.

        InternVL has equally many image tokens in each tile. LLaVA-OneVision, whose pixels are batch x tiles, does not, and drops
        the tiles that are padding: there all samples must have equally many.
        """
        pixels, tokens = self.batch.inputs["pixel_values"], self.batch.image_mask.sum(1)
        if pixels.ndim == 5:
            one_each = len(pixels) == len(tokens) and bool(tokens.all())  # images, not samples, are stacked
            tokens = torch.full_like(tokens, pixels.shape[1])
            fits = one_each and int(tokens.sum()) == rows
        else:
            fits = bool((tokens * rows % tokens.sum() == 0).all())
        if not fits:
            raise UserError(
                "the samples of a batch have different numbers of image tiles, and whose tile is whose cannot be told: "
                "take scope=language, or curvature.granularity=token instead of sequence."
            )
        return (tokens * rows // tokens.sum()).tolist()
