"""The quantisable linear layers of a vision-language model, by tower and block."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

import torch
from transformers import PreTrainedModel

from mgvq.errors import UserError
from mgvq.model.family import family_of
from mgvq.model.towers import Towers, block_numbers, find_towers
from mgvq.types import Site, Tower

Scope = Literal["language", "language_projector", "all"]
TOWERS: Mapping[Scope, tuple[Tower, ...]] = {
    "language": ("language",),
    "language_projector": ("language", "projector"),
    "all": ("language", "projector", "vision"),
}

# Siblings that read the same activations, unless the family declares others; model/passes.py checks that they do.
_READ_TOGETHER = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


def list_sites(model: PreTrainedModel, scope: Scope) -> list[Site]:
    """Every `nn.Linear` of the towers in scope, in the order of the data: vision, projector, language.

    Embeddings, the head, norms, convolutions and biases are no sites. Raises UserError for an unknown scope, for the projector's
    where that has no linear layer, and for a model whose towers are not clear or whose language blocks are not of linear layers.
    """
    if scope not in get_args(Scope):
        raise UserError(f"scope must be one of {', '.join(get_args(Scope))}; got {scope!r}")
    towers = find_towers(model)
    sites = [site for tower in towers.modules if tower in TOWERS[scope] for site in _tower_sites(model, towers, tower)]
    if scope == "language_projector" and not any(s.tower == "projector" for s in sites):
        projector = towers.modules.get("projector")
        what = f"{projector} holds no linear layer" if projector else "the model has no projector"
        raise UserError(f"scope=language_projector: {what}. Take scope=language.")
    _check_blocks_are_linear(model, towers, sites)
    return sites


def _tower_sites(model: PreTrainedModel, towers: Towers, tower: Tower) -> Iterator[Site]:
    blocks = {} if tower == "projector" else block_numbers(model, towers.modules[tower][0])
    head = model.get_output_embeddings()
    declared = family_of(model.config).shared_inputs
    together = _READ_TOGETHER if declared is None else declared
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head and towers.of(name) == tower:
            parent, kind = name.rsplit(".", 1)
            block = next((number for b, number in blocks.items() if name.startswith(f"{b}.")), None)
            reads = f"{parent}.{together.get(kind, kind)}"
            if kind.isdigit():  # of a Sequential: a number alone says nothing
                kind = f"{parent.rsplit('.', 1)[-1]}.{kind}"
            yield Site(name, tower, kind, block, module.out_features, module.in_features, reads)


def left_out_flags(model: PreTrainedModel, sites: Sequence[Site]) -> list[str]:
    """A flag for each tower whose blocks hold matrices that are no sites, with their share of the blocks' weights.

    Experts that are stored in one tensor are of this kind: they are no `nn.Linear`, and stay as they are.
    """
    towers = find_towers(model)
    flags: list[str] = []
    with_blocks: list[Tower] = [s.tower for s in sites if s.block is not None]
    for tower in dict.fromkeys(with_blocks):
        whole, listed = _matrices(model, towers, tower), _listed(sites, tower)
        if listed < whole:
            flags.append(f"left_out:{tower}:{1 - listed / whole:.1%} of the blocks' weights")
    return flags


def _check_blocks_are_linear(model: PreTrainedModel, towers: Towers, sites: Sequence[Site]) -> None:
    """Where most of the blocks is no `nn.Linear`, to quantise the rest would be another experiment than was asked for."""
    whole, listed = _matrices(model, towers, "language"), _listed(sites, "language")
    if listed < 0.5 * whole:
        raise UserError(
            f"only {listed:,} of {whole:,} weights in the blocks of {towers.modules['language'][0]} ({type(model).__name__}) are "
            "in linear layers; nothing else can be quantised yet."
        )


def _matrices(model: PreTrainedModel, towers: Towers, tower: Tower) -> int:
    """How many weights of two and more dimensions the blocks of a tower hold."""
    blocks = (model.get_submodule(b) for name in towers.modules[tower] for b in block_numbers(model, name))
    return sum(p.numel() for block in blocks for p in block.parameters() if p.ndim >= 2)


def _listed(sites: Sequence[Site], tower: Tower) -> int:
    return sum(s.num_weights for s in sites if s.tower == tower and s.block is not None)


def site_weights(model: PreTrainedModel, sites: Sequence[Site]) -> dict[Site, torch.Tensor]:
    """The weight (out, in) of each site, the very parameter of the model and no copy of it."""
    return {s: linear(model, s).weight.detach() for s in sites}


def linear(model: torch.nn.Module, site: Site) -> torch.nn.Linear:
    """The layer of a site."""
    module = model.get_submodule(site.name)
    assert isinstance(module, torch.nn.Linear)
    return module
