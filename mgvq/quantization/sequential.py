"""Rounding in the order of the data, every layer on the inputs that the layers quantised before it give."""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.model.blocks import Block, by_block
from mgvq.model.walk import BlockPass, BlockWalk, Visit, on_device
from mgvq.progress import progress
from mgvq.protocols import Lacking, Prefix
from mgvq.quantization.rounding import LayerRounder, Rounded
from mgvq.quantization.subject import Subject
from mgvq.quantization.tuning import BlockTuner
from mgvq.ranks.ranks import ALONE, Ranks
from mgvq.types import LayerProblem, Metric, Site


def sequential_rounding(
    subject: Subject,
    prefix: Prefix | None,
    rounder: LayerRounder,
    flags: list[str],
    finished: MutableMapping[str, Any] | None = None,
    tuner: BlockTuner | None = None,
) -> Rounded:
    """Block by block, and in a block the layers that read the same activations together, in the order of the data.

    The metric of a layer has `E[x~ x~^T]` for its input factor, x~ its input behind everything that is quantised so far; an
    output factor stays. `prefix` says how its target is moved before it is rounded; without one layers are rounded as they are.
    A `tuner` has the block once it is rounded. `finished` is as in `blockwise_rounding`, and not for tuned blocks, since an entry
    lacks what a tuner moves beside the layers. The model has its own parameters again in the end. Several processes run their
    own shares of the samples; but for a tuner, which has all of them in each.
    """
    finished, ranks = {} if finished is None else finished, ALONE if tuner else subject.ranks
    model, sites, samples, weights = subject.model, subject.sites, subject.samples, subject.weights
    walks, aside = list[BlockWalk](), samples.folder if weights.streamed else None
    for part in (samples.batches, samples.heldout):
        share = [on_device(batch, model) for batch in ranks.share(part)]
        walks.append(BlockWalk(model, sites, share, weights, on_device(part[-1], model) if part else None, aside=aside))
    rounded = Rounded()
    with weights.unchanged(sites) as originals, tuner.restored() if tuner else nullcontext():
        for number, block in enumerate(progress(list(by_block(sites)), "blocks")):
            own, taken, name = Rounded(), list[str](), f"block-{number:04}"
            if prefix is None:
                visits = [_at_full_precision(walk, block, originals) for walk in walks]
                own |= rounder.round(block, taken)
                weights.install(own.decoded, own.stored)
            else:
                streams = [_Streams(walks[0], block, originals, ranks)]
                streams += [
                    _Streams(walk, block, originals, ranks, streams[0].places) for walk in walks[1:]
                ]  # of held-out samples
                visits = [stream.visit for stream in streams]
                if (earlier := finished.get(name)) is not None:
                    own, taken = earlier
                    weights.install(own.decoded, own.stored)
                else:
                    for together in _by_input(block):
                        problems = _problems(together, rounder.problems, originals, prefix, streams)
                        now = rounder.with_problems(problems).round(together, taken)
                        weights.install(now.decoded, now.stored)
                        own |= now
                        del problems, now  # while the next ones are made
                    finished[name] = own, taken
            rounded |= own.packed() if weights.streamed else own
            flags += taken
            if tuner:
                rounded |= tuner(block, visits, own, flags)
            for walk in walks:
                walk.settle(block)
            visits, streams = [], []  # what they keep of this block would stand beside what is kept of the next one
    return rounded


def _problems(
    together: Sequence[Site],
    problems: Mapping[Site, LayerProblem],
    originals: Mapping[Site, Tensor],
    prefix: Prefix,
    streams: Sequence["_Streams"],
) -> dict[Site, LayerProblem]:
    """The problems of layers that read the same activations, behind the quantised prefix, in the bases that they have.

    Their inputs have one basis, and so they have one input factor.
    """
    moments, heldout = (stream.moments(together) for stream in streams)
    found = {site: _without_input_factor(problems[site]) for site in together}
    for site, problem in found.items():
        target = _target(problem, originals[site], prefix, moments[site], heldout[site])
        found[site] = replace(problem, target=target)
    del heldout
    gram, transform = moments[together[0]].gram, found[together[0]].transform
    h_in = (transform.input_factor(gram) if transform else gram).float()
    return {s: replace(p, metric=Metric((h_in,), p.metric.h_out if p.metric else None)) for s, p in found.items()}


def _without_input_factor(problem: LayerProblem) -> LayerProblem:
    """The problem without the input factor of full precision, which nobody reads here: in a wide layer a tenth of a gigabyte."""
    return replace(problem, metric=Metric((), problem.metric.h_out) if problem.metric else None)


def _at_full_precision(walk: BlockWalk, block: Block, originals: Mapping[Site, Tensor]) -> Visit:
    """The block visited, and run at full precision, from where the walk goes on."""
    visit = walk.visit(block, {site: originals[site] for site in block})
    for _ in visit.run("full_precision"):
        pass
    return visit


@dataclass(frozen=True)
class _Moments:
    """Means over the tokens of one layer."""

    num_tokens: int
    gram: Float[Tensor, "in in"]  # E[x~ x~^T]
    of: Lacking  # what r brings back
    lacking: Float[Tensor, "out in"]  # E[r x~^T]


def _target(problem: LayerProblem, weight: Tensor, prefix: Prefix, moments: _Moments, heldout: _Moments) -> Tensor:
    """What the layer is to be rounded to behind the quantised prefix, in the basis of the problem."""
    held = (heldout.lacking, heldout.gram) if heldout.num_tokens else None
    move = prefix.correction(moments.of, moments.lacking, moments.gram, held)
    return problem.target if move is None else problem.of_model((weight.double() + move.to(weight.device)).float())


def _by_input(block: Block) -> Iterator[list[Site]]:
    """The layers of a block that read the same activations, in the order of their first ones."""
    together: dict[str, list[Site]] = {}
    for site in block:
        together.setdefault(site.reads, []).append(site)
    yield from together.values()


class _Streams:
    """One block of a walk: what its layers read at full precision, and what they lack behind the quantised prefix.

    `places`: as another walk over the same model has found them; None: they are looked for. Activations are kept as the model has
    them, in its dtype and where the walk keeps its own, until the moments of the layers that they are for are taken; the stream
    behind a block is the very tensor that the walk goes on with. Of several processes (`ranks`) each has its own share of the
    batches in its walk.
    """

    def __init__(
        self,
        walk: BlockWalk,
        block: Block,
        originals: Mapping[Site, Tensor],
        ranks: Ranks = ALONE,
        places: Mapping[Site, tuple[str, str]] | None = None,
    ) -> None:
        self._walk, self._originals, self._ranks = walk, originals, ranks
        self.visit = walk.visit(block, {site: originals[site] for site in block})
        self._names = {site: site.name.removeprefix(self.visit.name).removeprefix(".") for site in block}
        if places is None:  # all take those of the first process that has a call of the block
            found = ranks.gather("places of the stream", _stream_places(self.visit, self._names))
            places = next((own for own in found if own is not None), {})
        self.places = places
        firsts = [together[0] for together in _by_input(block) if set(together) - set(self.places)]
        self._inputs: dict[str, list[Tensor]] = {site.reads: [] for site in firsts}  # by what they are inputs of
        self._behind: dict[Site, list[Tensor]] = {site: [] for site in self.places}
        watched = {self._names[site] for site in firsts} | {after for _, after in self.places.values()}
        for one in self.visit.run("full_precision", sorted(watched - _ENDS)):
            for site in firsts:
                self._inputs[site.reads].append(walk.put(_at(one, self._names[site])))
            for site, (_, after) in self.places.items():
                self._behind[site].append(_at(one, after) if after == _EXIT else walk.put(_at(one, after)))

    def moments(self, together: Sequence[Site]) -> dict[Site, _Moments]:
        """The moments of layers that read the same activations, taken once; zeros where no sample reaches them.

        An output lacks `W (x - x~)`, and the stream what it was less what it is before the layer and less `W x~`: the products
        with W are taken of the moments, not token by token.
        """
        first, num_tokens = together[0], 0
        into_stream = [site for site in together if site in self.places]
        sums: dict[str | Site, _Sum] = {"gram": _Sum(first.in_features, first.in_features)}
        if first.reads in self._inputs:
            sums["drift"] = _Sum(first.in_features, first.in_features)
        sums |= {site: _Sum(site.out_features, site.in_features) for site in into_stream}
        befores = {self.places[site][0] for site in into_stream}
        inputs, behind = self._inputs.pop(first.reads, []), {site: self._behind.pop(site) for site in into_stream}
        for number, one in enumerate(self.visit.run("quantized", sorted({self._names[first]} | befores - _ENDS), whole=False)):
            x = self._tokens(first, one, _at(one, self._names[first]))
            num_tokens += len(x)
            sums["gram"].add(x.T @ x)
            if "drift" in sums:
                sums["drift"].add((self._tokens(first, one, inputs[number]) - x).T @ x)
            for site in into_stream:
                lack = self._tokens(site, one, behind[site][number]) - self._tokens(site, one, _at(one, self.places[site][0]))
                if (bias := self._walk.weights.bias(site)) is not None:
                    lack = lack - bias.float()
                sums[site].add(lack.T @ x)
        num_tokens = sum(self._ranks.gather("tokens", num_tokens))
        totals = self._ranks.total("moments", {key: own.total for key, own in sums.items()})
        sums.clear()
        count, gram, lacking = max(1, num_tokens), totals["gram"], dict[Site, Tensor]()
        for site in together:
            weight = self._originals[site].double().cpu()
            lacks = totals[site].sub_(weight @ gram) if site in totals else weight @ totals["drift"]
            lacking[site] = lacks.div_(count)
        mean = gram.div_(count).float()
        return {
            site: _Moments(num_tokens, mean, "stream" if site in totals else "output", lacks) for site, lacks in lacking.items()
        }

    def _tokens(self, site: Site, one: BlockPass, values: Float[Tensor, "*b c"]) -> Float[Tensor, "tokens c"]:
        """The rows of real tokens among values of a call, float32."""
        return self.visit.tokens(one.call, values, site.tower).float()


def _at(one: BlockPass, place: str) -> Float[Tensor, "*b c"]:
    """What is at a place: the input of a module, or one of the ends of the block."""
    return one.call.hidden if place == _ENTRY else one.output if place == _EXIT else one.inputs[place]


class _Sum:
    """A sum of float32 products in float64 on the CPU, a few rows at a time: a wide copy of a product is as large as the sum."""

    def __init__(self, rows: int, columns: int) -> None:
        self.total = torch.zeros(rows, columns, dtype=torch.float64)

    def add(self, product: Float[Tensor, "rows columns"]) -> None:
        for into, few in zip(self.total.split(_ROWS), product.cpu().split(_ROWS), strict=True):
            into += few


_ROWS = 256  # of a product that are added at a time
_ENTRY, _EXIT = "<entry>", "<exit>"  # the hidden states that go into a block, and those that come out
_ENDS = {_ENTRY, _EXIT}


def _stream_places(visit: Visit, names: Mapping[Site, str]) -> dict[Site, tuple[str, str]] | None:
    """For each layer whose output is added to the residual stream: where the stream is before that, and where behind.

    Found in one pass, not guessed from names: the places are the ends of the block and the inputs of its modules, and the sum of
    one of them and the layer's output is another. A layer behind which a norm or a scale stands has none. None where no sample
    comes to the block.
    """
    calls = visit.calls["full_precision"][:1]
    hidden = calls[0].hidden if calls else None
    if hidden is None:
        return None
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
    return rows[:: max(1, -(-len(rows) // 16))]


def _adds_up(before: Tensor, output: Tensor, after: Tensor) -> bool:
    total = (before + output).to(after.dtype)  # rounded as the model rounds it, to 16 bits perhaps
    return torch.allclose(total.float(), after.float(), rtol=1e-4, atol=1e-5 * float(after.abs().max()))
