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
from mgvq.model.answers import answer_logits
from mgvq.model.hooks import after_forward
from mgvq.model.pack import PackedBatch
from mgvq.rng import generator
from mgvq.types import Batch, Modality, Site


@dataclass
class Seen:
    """What a pass has left at the sites: inputs by `Site.reads`, and outputs by site (of the sites that were called)."""

    inputs: dict[str, Float[Tensor, "... in"]] = field(default_factory=dict)
    outputs: dict[Site, Float[Tensor, "... out"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Forward:
    """What a batch left behind: inputs by `Site.reads` and outputs by site (of the sites that were called), both for `gradients`.

    `logs`: log-probabilities at the positions that predict the answer tokens, row by row.
    """

    inputs: Mapping[str, Float[Tensor, "... in"]]
    outputs: Mapping[Site, Float[Tensor, "... out"]]
    logs: Float[Tensor, "answers vocabulary"]

    def gradients(self, labels: Int[Tensor, "answers"], *, last: bool) -> dict[Site, Float[Tensor, "... out"]]:
        """Gradients of the summed cross-entropy with respect to every site's output; `last` frees the graph."""
        return self.backward(-self.logs.gather(1, labels[:, None]).sum(), last=last)

    def backward(self, loss: Float[Tensor, ""], *, last: bool) -> dict[Site, Float[Tensor, "... out"]]:
        """Gradients of a loss that was computed from `logs`."""
        outputs = list(self.outputs.values())
        if not outputs:  # sites of the vision tower, and no image in the batch
            return {}
        if not loss.requires_grad:  # nobody uses what any of these layers puts out
            return {site: torch.zeros_like(output, dtype=torch.float32) for site, output in self.outputs.items()}
        # A layer whose output nobody uses (a vision tower's last block, say) has the gradient 0.
        found = torch.autograd.grad(loss, outputs, retain_graph=not last, allow_unused=True, materialize_grads=True)
        return {site: gradient.float() for site, gradient in zip(self.outputs, found, strict=True)}


def forward(
    model: torch.nn.Module,
    sites: Sequence[Site],
    batch: Batch | PackedBatch,
    see: Callable[[Site, Tensor], object],
    *,
    graph: bool,
) -> Forward:
    """Run the batch, its sites `seen`."""
    with seen(model, sites, see, graph=graph) as at_sites:
        logs = answer_logits(model, batch).log_softmax(-1)
    return Forward(at_sites.inputs, at_sites.outputs, logs)


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


def sampled_labels(logs: Float[Tensor, "answers vocabulary"], batch: Batch, seed: int) -> Int[Tensor, "answers"]:
    """A draw from the model at every answer position, by inversion. Every sample has its own stream: batches do not matter.

    Raises UserError, with the sample, where the model's predictions are no numbers.
    """
    sizes = batch.loss_mask.sum(1).tolist()
    if logs.isnan().any():
        bad = next(n for n, own in zip(batch.sample_ids, logs.split(sizes), strict=True) if own.isnan().any())
        raise UserError(f"{bad}: the model's predictions are NaN or infinite: set model.dtype=float32, or leave the sample out.")
    draws = [
        torch.rand(size, 1, generator=generator(seed, "labels", name), dtype=torch.float64)
        for size, name in zip(sizes, batch.sample_ids, strict=True)
    ]
    ladder = logs.detach().double().exp().cumsum(-1)
    return torch.searchsorted(ladder, torch.cat(draws).to(ladder.device) * ladder[:, -1:])[:, 0]


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
