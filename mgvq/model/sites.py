"""The quantisable linear layers of a vision-language model, by tower and block."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from transformers import PreTrainedModel

from mgvq.errors import UserError
from mgvq.types import Site, Tower

Scope = Literal["language", "language_projector", "all"]
TOWERS: Mapping[Scope, tuple[Tower, ...]] = {
    "language": ("language",),
    "language_projector": ("language", "projector"),
    "all": ("language", "projector", "vision"),
}

# model_type -> module name of each tower; in the order in which data flows through them.
FAMILIES: Mapping[str, Mapping[Tower, str]] = {
    family: {
        "vision": "model.vision_tower",
        "projector": "model.multi_modal_projector",
        "language": "model.language_model",
    }
    for family in ("llava_onevision", "internvl")
}
_BLOCK = re.compile(r"\.layers?\.(\d+)\.")
# Siblings that read the same activations; curvature/statistics.py checks that they do.
_READ_TOGETHER = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


def list_sites(model: PreTrainedModel, scope: Scope) -> list[Site]:
    """Every `nn.Linear` of the towers in scope, in the order of the data: vision, projector, language.

    Embeddings, the head, norms, convolutions and biases are no sites. Raises UserError for an unknown scope or family.
    """
    if scope not in get_args(Scope):
        raise UserError(f"scope must be one of {', '.join(get_args(Scope))}; got {scope!r}")
    family = str(model.config.model_type)
    if family not in FAMILIES:
        raise UserError(f"model family {family!r} is not known; known are {', '.join(FAMILIES)} (mgvq/model/sites.py)")
    sites = []
    for tower, prefix in FAMILIES[family].items():
        if tower not in TOWERS[scope]:
            continue
        for name, module in model.get_submodule(prefix).named_modules(prefix=prefix):
            if isinstance(module, torch.nn.Linear):
                block = _BLOCK.search(name)
                parent, kind = name.rsplit(".", 1)
                num_block = int(block[1]) if block else None
                reads = f"{parent}.{_READ_TOGETHER.get(kind, kind)}"
                sites.append(Site(name, tower, kind, num_block, module.out_features, module.in_features, reads))
    return sites


def site_weights(model: PreTrainedModel, sites: Sequence[Site]) -> dict[Site, torch.Tensor]:
    """The weight (out, in) of each site; no copy."""
    return {s: linear(model, s).weight.detach() for s in sites}


def linear(model: torch.nn.Module, site: Site) -> torch.nn.Linear:
    """The layer of a site."""
    module = model.get_submodule(site.name)
    assert isinstance(module, torch.nn.Linear)
    return module
