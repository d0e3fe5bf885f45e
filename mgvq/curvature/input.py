"""The Gram of each layer's inputs, by modality (the Hessian of GPTQ): one streamed forward pass, padding masked."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mgvq.types import Batch, Modality, Site, SiteStats, StatsBank

_MODALITIES: tuple[Modality, ...] = ("image", "text")


@dataclass(frozen=True, kw_only=True)
class Input:
    """`sum x x^T` in float64 at every site. Vision tower and projector see image tokens only."""

    def collect(self, model: PreTrainedModel, sites: Sequence[Site], batches: Iterator[Batch]) -> StatsBank:
        device = next(model.parameters()).device
        sums: dict[Site, dict[Modality, _Sum]] = {s: {m: _Sum(s.in_features, device) for m in _MODALITIES} for s in sites}
        masks: dict[Modality, Tensor] = {}
        hooks = [model.get_submodule(s.name).register_forward_pre_hook(_adder(s, sums[s], masks)) for s in sites]
        try:
            with torch.inference_mode():
                for batch in batches:
                    batch = batch.to(device)
                    masks["image"] = batch.image_mask
                    masks["text"] = batch.valid_mask & ~batch.image_mask
                    model(**batch.inputs, use_cache=False, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        return {s: _stats(parts) for s, parts in sums.items()}


class _Sum:
    def __init__(self, num_in: int, device: torch.device) -> None:
        self.count = 0
        self.gram = torch.zeros(num_in, num_in, dtype=torch.float64, device=device)

    def add(self, tokens: Tensor) -> None:
        self.count += len(tokens)
        wide = tokens.double()
        self.gram += wide.T @ wide


def _stats(parts: dict[Modality, _Sum]) -> SiteStats:
    num_tokens: dict[Modality, int] = {m: total.count for m, total in parts.items()}
    gram: dict[Modality, Tensor] = {m: total.gram.cpu() for m, total in parts.items()}
    return SiteStats(num_tokens, gram)


def _adder(site: Site, parts: dict[Modality, _Sum], masks: dict[Modality, Tensor]) -> Callable[..., None]:
    def add(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
        tokens = args[0]
        if site.tower == "language":
            for modality, total in parts.items():
                total.add(tokens[masks[modality]])
        else:
            parts["image"].add(tokens.reshape(-1, site.in_features))

    return add
