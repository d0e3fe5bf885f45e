"""How far a half-quantised model has drifted from full precision: gradients on calibration samples, losses on held-out ones."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from mgvq.curvature.passes import forward, right_labels
from mgvq.errors import UserError
from mgvq.model.answers import answer_logits
from mgvq.model.pack import PackedBatch
from mgvq.types import Batch, Site

AnyBatch = Batch | PackedBatch


class Drift:
    """Keeps the answers' log-probabilities of the model as it is when this is made: the teacher of `kl`.

    `batches` for gradients and `heldout` for losses must share no sample. Raises UserError where there is no held-out sample.
    """

    def __init__(self, model: PreTrainedModel, batches: Iterable[AnyBatch], heldout: Iterable[AnyBatch]) -> None:
        self.model = model
        self.batches, self.heldout = ([_moved(b, model) for b in part] for part in (batches, heldout))
        if not self.heldout:
            raise UserError(
                "the step of the gradient is chosen on held-out samples, and there are none: raise calibration.heldout_images."
            )
        if both := {i for b in self.batches for i in b.sample_ids} & {i for b in self.heldout for i in b.sample_ids}:
            raise AssertionError(f"samples of the gradient are held out: {sorted(both)[:3]}")
        with torch.inference_mode():
            self._teacher, self._heldout_teacher = ([self._logs(b) for b in part] for part in (self.batches, self.heldout))

    def gradient(self, sites: Sequence[Site], source: str) -> Mapping[Site, Float[Tensor, "_ _"]]:
        """Of the mean loss an answer token with respect to the weights of `sites`, at the model's present weights."""
        sums = {site: torch.zeros(site.out_features, site.in_features, dtype=torch.float64) for site in sites}
        num_answers = 0
        for batch, teacher in zip(self.batches, self._teacher, strict=True):
            run = forward(self.model, sites, batch, lambda *_: None, graph=True)
            loss = _loss(run.logs, batch, teacher, source).sum()
            num_answers += len(run.logs)
            for site, g in run.backward(loss, last=True).items():
                sums[site] += (g.flatten(0, -2).T @ run.inputs[site.reads].flatten(0, -2)).double().cpu()
        return {site: (total / max(1, num_answers)).float() for site, total in sums.items()}

    @torch.inference_mode()
    def heldout_loss(self, source: str) -> float:
        """Mean over the answer tokens of the held-out samples."""
        losses = [_loss(self._logs(b), b, t, source) for b, t in zip(self.heldout, self._heldout_teacher, strict=True)]
        return float(torch.cat(losses).double().mean())

    def _logs(self, batch: AnyBatch) -> Float[Tensor, "answers vocabulary"]:
        return answer_logits(self.model, batch).log_softmax(-1)


def _loss(logs: Tensor, batch: AnyBatch, teacher: Tensor, source: str) -> Float[Tensor, "answers"]:
    if source == "kl":
        return (teacher.exp() * (teacher - logs)).sum(-1)
    return -logs.gather(1, right_labels(batch)[:, None])[:, 0]


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
