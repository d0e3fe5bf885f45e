"""The stress variant of a model: channel scales that make it hard to quantise and leave what it computes as it is.

In a block, the output channels of a norm are multiplied by `s` and the input columns of the linear layers that read it divided by
`s`; likewise the output rows of the value projection against the columns of the output projection, and the rows of the up
projection against the columns of the down projection. `s = exp(sigma N(0, 1))`, rounded to a power of two: the model computes
the same to the bit, also from a checkpoint in bfloat16, and in float16 but for weights that become too small for it. We build
the spread of the scales, so a method that looks for such scales can undo it: a result on it is one about outlier channels, not
about natural models.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from mgvq.errors import UserError
from mgvq.model.answers import answer_logits
from mgvq.model.hooks import after_forward
from mgvq.model.sites import linear, list_sites
from mgvq.model.source import Stress
from mgvq.model.towers import block_numbers, find_towers
from mgvq.rng import generator
from mgvq.types import Batch

# A layer that is linear in the outputs of another: through attention, whose weights do not depend on them, and a gate.
_THROUGH = {"v_proj": "o_proj", "up_proj": "down_proj"}


@dataclass(frozen=True)
class Pair:
    """A layer whose output channels are scaled, and those that undo it, by their names."""

    source: str  # a norm or a linear layer
    readers: tuple[str, ...]  # the linear layers whose input columns are divided by the scales


@torch.no_grad()
def inject(model: PreTrainedModel, probe: Batch, stress: Stress) -> list[Pair]:
    """Scale the blocks of the language tower in place; returns what was scaled, in the order of the blocks.

    `probe` is a batch of inputs: who reads which norm is seen in a forward pass, not guessed. Raises UserError where no norm is
    read by linear layers alone, or the model then computes something else than before.
    """
    assert stress.sigma is not None
    pairs, before = find_pairs(model, probe)
    for pair in pairs:
        source: Any = model.get_submodule(pair.source)
        readers: list[Any] = [model.get_submodule(name) for name in pair.readers]
        size = source.weight.shape[0]
        draws = torch.randn(size, generator=generator(stress.seed, "stress", pair.source), dtype=torch.float64)
        scale = torch.exp2((stress.sigma * draws / torch.tensor(2.0).log()).round()).to(source.weight)
        source.weight.mul_(scale if source.weight.ndim == 1 else scale[:, None])
        if getattr(source, "bias", None) is not None:
            source.bias.mul_(scale)
        for reader in readers:
            reader.weight.div_(_columns(model, scale, reader.in_features))
    after = answer_logits(model, probe)
    if not torch.allclose(after, before, rtol=0, atol=1e-3 * float(before.std())):
        raise UserError(
            f"model.stress: {type(model).__name__} computes something else after the scales than before (answer logits move by "
            f"{float((after - before).abs().max()):.3g}, their spread is {float(before.std()):.3g}); a norm that adds to its "
            f"weight, say, cannot be scaled so. Scaled were: {_text(pairs)}."
        )
    return pairs


def _columns(model: PreTrainedModel, scale: Float[Tensor, "c"], num_columns: int) -> Float[Tensor, "columns"]:
    """The scales of the reader's columns: one each, or those of a head of the values again for each of its query heads."""
    if len(scale) == num_columns:
        return scale
    num_heads = model.config.get_text_config(decoder=True).num_key_value_heads
    return scale.view(num_heads, -1).repeat_interleave(num_columns // len(scale), 0).flatten()


def find_pairs(model: PreTrainedModel, probe: Batch) -> tuple[list[Pair], Float[Tensor, "answers vocabulary"]]:
    """The pairs of the language tower's blocks, and the logits of the pass in which they were seen. Raises UserError for none."""
    sites = [s for s in list_sites(model, "language") if s.block is not None]
    linears = {s.name: linear(model, s) for s in sites}
    (language,) = find_towers(model).modules["language"]
    norms = {
        name: module
        for block in block_numbers(model, language)
        for name, module in model.get_submodule(block).named_modules(prefix=block)
        if _is_norm(module)
    }
    with _watch(model, [*norms, *linears]) as seen:
        logits = answer_logits(model, probe)
    pairs = []
    for name in norms:
        readers = tuple(n for n in linears if seen.inputs[n] is seen.outputs[name])
        if readers:
            pairs.append(Pair(name, readers))
    for site in sites:
        other = site.name.removesuffix(site.kind) + _THROUGH.get(site.kind, "")
        if site.kind in _THROUGH and other in linears and linears[other].in_features % site.out_features == 0:
            pairs.append(Pair(site.name, (other,)))
    if not any(pair.source in norms for pair in pairs):
        kinds = sorted({s.kind for s in sites})
        raise UserError(
            f"model.stress: in the blocks of {type(model).__name__} no norm is read by linear layers as it is. Norms there: "
            f"{', '.join(sorted({n.rsplit('.', 1)[-1] for n in norms})) or 'none'}; linear layers: {', '.join(kinds)}."
        )
    return pairs, logits


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has a `weight` of its own, and all its parameters have one dimension."""
    parameters = dict(module.named_parameters())
    return "weight" in parameters and all(p.ndim == 1 for p in parameters.values())


@dataclass(frozen=True)
class _Seen:
    """The very tensors that went into and came out of modules, kept alive so that no other takes their place."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]


@contextmanager
def _watch(model: nn.Module, names: Sequence[str]) -> Iterator[_Seen]:
    seen = _Seen({}, {})

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen.inputs[name], seen.outputs[name] = inputs[0], output

    with after_forward(model, {name: functools.partial(note, name) for name in names}):
        yield seen


def _text(pairs: list[Pair]) -> str:
    return "; ".join(f"{p.source} -> {', '.join(p.readers)}" for p in pairs[:5]) + (" ..." if len(pairs) > 5 else "")
