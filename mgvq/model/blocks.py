"""Blocks: the layers of one transformer block, which are quantised together."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mgvq.model.hooks import after_forward, before_forward
from mgvq.model.sites import linear
from mgvq.types import Site

Block = Sequence[Site]


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


def block_name(block: Block) -> str:
    """The module that holds a block: a site's name up to the block's number; a site outside the blocks is one itself."""
    site = block[0]
    if site.block is None:
        return site.name
    parts, number = site.name.split("."), str(site.block)
    if number not in parts:  # blocks of a tower with several lists are numbered through
        number = next(part for part in parts if part.isdigit())
    return ".".join(parts[: parts.index(number) + 1])


def rows_of_blocks(sites: Sequence[Site]) -> list[list[str]]:
    """The names of the blocks of each tower, in order: each passes its output on to the next of its row."""
    rows: dict[str, list[str]] = {}
    for block in by_block(sites):
        if block[0].block is not None:
            rows.setdefault(block[0].tower, []).append(block_name(block))
    return list(rows.values())


@contextmanager
def modules_before(model: torch.nn.Module, sites: Sequence[Site]) -> Iterator[list[str]]:
    """Filled by a forward pass: the modules that the model is made of (a tower, say) and that ran before any site.

    None of their weights is quantised, so that what they put out stays the same.
    """
    base = model.base_model
    assert isinstance(base, torch.nn.Module)
    prefix = next(name for name, module in model.named_modules() if module is base)
    calls: list[str] = []
    before: list[str] = []
    parts = [f"{prefix}.{name}" for name, _ in base.named_children()]
    begun = {site.name: lambda *_: calls.append("") for site in sites}
    done = {name: lambda *_, name=name: calls.append(name) for name in parts}
    with before_forward(model, begun), after_forward(model, done):
        yield before
    first = calls.index("") if "" in calls else 0
    before += [name for name in dict.fromkeys(calls[:first]) if name not in calls[first:]]


def install(model: torch.nn.Module, weights: Mapping[Site, Tensor]) -> None:
    """Copy weights into the model. Whoever calls this owns the model until the weights are back (`Weights.unchanged`)."""
    for site, weight in weights.items():
        linear(model, site).weight.data.copy_(weight)
