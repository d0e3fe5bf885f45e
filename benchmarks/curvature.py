"""What the statistics cost, against the plain passes that they need."""

from collections.abc import Callable
from functools import partial

import torch

from mgvq.calibration.tiny_vqa import TinyVQA
from mgvq.curvature.statistics import collect
from mgvq.model.load import Loaded, load
from mgvq.model.sites import linear, list_sites
from mgvq.model.source import SHIPPED, Source
from mgvq.types import Batch, Needs, Site


def pairs() -> dict[str, tuple[Callable[[], object], str, Callable[[], object]]]:
    """Name -> (what is measured, what it is held against, that)."""
    drawn = TinyVQA(num_images=16, questions_per_image=8, heldout_images=0, shown="both", seed=0, label_seed=0).draw()
    found = {}
    for name in ("tiny_llava_onevision", "tiny_internvl"):
        source = Source(name=name, path=str(SHIPPED / name), revision=None, dtype="float32")
        loaded = load(source, torch.device("cpu"))
        sites, batches = list_sites(loaded.model, "language"), list(drawn.batches(loaded.processor))
        found[f"statistics of the language layers, 128 samples, {name}"] = (
            partial(collect, loaded.model, sites, batches, Needs(gram=True, fisher=True, saliency=True, gradient=True), 0),
            "a forward pass, a backward pass to the layers' outputs, one to outputs and weights",
            partial(plain, loaded, sites, batches),
        )
    return found


def plain(loaded: Loaded, sites: list[Site], batches: list[Batch]) -> None:
    """The passes alone, as autograd does them."""
    layers = [linear(loaded.model, site) for site in sites]
    outputs: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, output: outputs.append(output)) for layer in layers]
    try:
        for layer in layers:
            layer.weight.requires_grad_()
        for batch in batches:
            outputs.clear()
            longest = int(batch.loss_mask.sum(1).max())
            logits = loaded.model(**batch.inputs, use_cache=False, logits_to_keep=longest + 1).logits
            logs = logits[:, :-1][batch.loss_mask[:, -longest:]].log_softmax(-1)
            loss = -logs.gather(1, batch.inputs["input_ids"][batch.loss_mask][:, None]).sum()
            torch.autograd.grad(loss, outputs, retain_graph=True)
            torch.autograd.grad(loss, [*outputs, *(layer.weight for layer in layers)])
    finally:
        for layer, hook in zip(layers, hooks, strict=True):
            layer.weight.requires_grad_(False)
            hook.remove()
