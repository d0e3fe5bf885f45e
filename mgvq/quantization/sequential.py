"""Rounding in the order of the data, every layer on the inputs that the layers quantised before it give."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from mgvq.model.blocks import Block, by_block, install, restored
from mgvq.model.sites import linear, site_weights
from mgvq.model.walk import BlockPass, BlockWalk, PrefixName, Visit, on_device
from mgvq.progress import progress
from mgvq.protocols import Lacking, Prefix
from mgvq.quantization.blockwise import Samples
from mgvq.quantization.codebooks import CodebookCache
from mgvq.quantization.rounding import LayerRounder, Rounded
from mgvq.types import LayerProblem, Metric, Rate, Site


def sequential_rounding(
    model: PreTrainedModel,
    sites: Sequence[Site],
    prefix: Prefix,
    samples: Samples,
    cache: CodebookCache,
    rates: Sequence[Rate],
    rounder: LayerRounder,
    flags: list[str],
) -> Rounded:
    """Block by block, and in a block the layers that read the same activations together, in the order of the data.

    The metric of a layer has `E[x~ x~^T]` for its input factor, x~ its input behind everything that is quantised so far; an
    output factor stays. `prefix` says how its target is moved before it is rounded. `model` has its own weights again in the end.
    """
    originals = {site: weight.clone() for site, weight in site_weights(model, sites).items()}
    walks = [BlockWalk(model, sites, [on_device(b, model) for b in part]) for part in (samples.batches, samples.heldout)]
    rounded = Rounded()
    with restored(model, originals):
        for block in progress(list(by_block(sites)), "blocks"):
            streams = [_Streams(walk, block, originals) for walk in walks]
            for together in _by_input(block):
                moments = [stream.moments(together) for stream in streams]
                problems = {}
                for site in together:
                    problem = cache.problems[site]
                    problems[site] = _sequential(problem, originals[site], prefix, *(m[site] for m in moments))
                rounded |= rounder.round(cache.with_problems(problems), rates, together, flags)
                install(model, {site: rounded.decoded[site] for site in together})
            for walk in walks:
                walk.settle(block)
    return rounded


@dataclass(frozen=True)
class _Moments:
    """Means over the tokens of one layer."""

    num_tokens: int
    gram: Float[Tensor, "in in"]  # E[x~ x~^T]
    of: Lacking  # what r brings back
    lacking: Float[Tensor, "out in"]  # E[r x~^T]


def _sequential(problem: LayerProblem, weight: Tensor, prefix: Prefix, moments: _Moments, heldout: _Moments) -> LayerProblem:
    """The layer's problem behind the quantised prefix, in the basis that it has."""
    held = (heldout.lacking, heldout.gram) if heldout.num_tokens else None
    move, target = prefix.correction(moments.of, moments.lacking, moments.gram, held), problem.target
    if move is not None:
        moved = (weight.double() + move.to(weight.device)).float()
        target = problem.transform.weight(moved) if problem.transform else moved
    gram = problem.transform.input_factor(moments.gram) if problem.transform else moments.gram
    h_out = problem.metric.h_out if problem.metric else None
    return replace(problem, target=target, metric=Metric((gram.float(),), h_out))


def _by_input(block: Block) -> Iterator[list[Site]]:
    """The layers of a block that read the same activations, in the order of their first ones."""
    together: dict[str, list[Site]] = {}
    for site in block:
        together.setdefault(site.reads, []).append(site)
    yield from together.values()


class _Streams:
    """One block of a walk: what its layers put out at full precision, and what they lack behind the quantised prefix."""

    def __init__(self, walk: BlockWalk, block: Block, originals: Mapping[Site, Tensor]) -> None:
        self._walk, self._originals = walk, originals
        self._visit = walk.visit(block, {site: originals[site] for site in block})
        self._names = {site: site.name.removeprefix(self._visit.name).removeprefix(".") for site in block}
        self._places = _stream_places(self._visit, self._names)
        self._outputs: dict[Site, list[Tensor]] = {site: [] for site in block}
        self._behind: dict[Site, list[Tensor]] = {site: [] for site in self._places}
        for one in self._passes("full_precision", list(block)):
            for site in block:
                self._outputs[site].append(self._linear(site, self._tokens(site, one, self._names[site])))
            for site, (_, after) in self._places.items():
                self._behind[site].append(self._tokens(site, one, after))

    def moments(self, together: Sequence[Site]) -> dict[Site, _Moments]:
        """The moments of layers that read the same activations; zeros where no sample reaches them."""
        first = together[0]
        gram = torch.zeros(first.in_features, first.in_features, dtype=torch.float64)
        sums = {site: torch.zeros(site.out_features, site.in_features, dtype=torch.float64) for site in together}
        num_tokens = 0
        for number, one in enumerate(self._passes("quantized", together)):
            x = self._tokens(first, one, self._names[first])
            num_tokens += len(x)
            gram += (x.T @ x).double().cpu()
            for site in together:
                lack = self._lacking(site, number, one, x)
                sums[site] += (lack.T @ x).double().cpu()
        count = max(1, num_tokens)
        return {
            site: _Moments(num_tokens, (gram / count).float(), "stream" if site in self._places else "output", total / count)
            for site, total in sums.items()
        }

    def _lacking(self, site: Site, number: int, one: BlockPass, x: Tensor) -> Tensor:
        present = self._linear(site, x)
        if site not in self._places:
            return self._outputs[site][number] - present
        before, _ = self._places[site]
        return self._behind[site][number] - self._tokens(site, one, before) - present

    def _linear(self, site: Site, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        bias = linear(self._walk.model, site).bias
        return torch.nn.functional.linear(x, self._originals[site].float(), None if bias is None else bias.float())

    def _passes(self, prefix: PrefixName, sites: Sequence[Site]) -> Iterator[BlockPass]:
        watched = {self._names[site] for site in sites}
        watched |= {name for site in sites if site in self._places for name in self._places[site] if name not in _ENDS}
        return self._visit.run(prefix, sorted(watched))

    def _tokens(self, site: Site, one: BlockPass, place: str) -> Float[Tensor, "tokens c"]:
        """The rows of real tokens of what is at a place: the input of a module, or one of the ends of the block."""
        values = one.call.hidden if place == _ENTRY else one.output if place == _EXIT else one.inputs[place]
        if site.tower != "language":  # towers without padding
            return values.flatten(0, -2).float()
        return values[self._walk.batches[one.call.number].valid_mask].float()


_ENTRY, _EXIT = "<entry>", "<exit>"  # the hidden states that go into a block, and those that come out
_ENDS = (_ENTRY, _EXIT)


def _stream_places(visit: Visit, names: Mapping[Site, str]) -> dict[Site, tuple[str, str]]:
    """For each layer whose output is added to the residual stream: where the stream is before that, and where behind.

    Found in one pass, not guessed from names: the places are the ends of the block and the inputs of its modules, and the sum of
    one of them and the layer's output is another. A layer behind which a norm or a scale stands has none.
    """
    calls = visit.calls["full_precision"][:1]
    hidden = calls[0].hidden if calls else None
    if hidden is None:
        return {}
    modules = [name for name, module in visit.module.named_modules() if name and not list(module.children())]
    one = next(visit.first("full_precision", [name for name in modules if name not in names.values()]), None)
    assert one is not None
    values = {_ENTRY: hidden, **one.inputs, _EXIT: one.output}
    values = {place: _few(value) for place, value in values.items() if value.shape == hidden.shape}
    outputs = visit.outputs("full_precision", list(names.values()))
    places = {}
    for site, name in names.items():
        if name not in outputs or outputs[name].shape != hidden.shape:
            continue
        added = _few(outputs[name])
        pairs = ((a, b) for a, before in values.items() for b, after in values.items() if _adds_up(before, added, after))
        if found := next(pairs, None):
            places[site] = found
    return places


def _few(values: Float[Tensor, "*tokens c"]) -> Float[Tensor, "few c"]:
    """Some tokens from all over: enough to tell one sum from another."""
    rows = values.flatten(0, -2)
    return rows[:: -(-len(rows) // 16)].float()


def _adds_up(before: Tensor, output: Tensor, after: Tensor) -> bool:
    return torch.allclose(before + output, after, rtol=1e-4, atol=1e-5 * float(after.abs().max()))
