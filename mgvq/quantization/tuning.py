"""Tuning of what codes leave open: the model or a block as a function of its tables, scales, norms and biases."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from mgvq.model.answers import answer_logits, answer_states, logits
from mgvq.model.blocks import Block, block_name, by_block, install
from mgvq.model.load import as_stored
from mgvq.model.towers import find_towers
from mgvq.model.walk import AnyBatch, Visit, on_device
from mgvq.protocols import Descended, QuantizedWeight, Tuning
from mgvq.quantization.embeddings import embeddings
from mgvq.quantization.report import QuantReport
from mgvq.quantization.rounding import Rounded
from mgvq.quantization.subject import Samples
from mgvq.quantization.table_groups import TableGroup
from mgvq.types import Site, Tower

_FEW = 4  # numbers that a weight may be linear in for the weight of each to be kept, which is quicker than decoding


def tuned(
    model: PreTrainedModel,
    sites: Sequence[Site],
    report: QuantReport,
    tuning: Tuning,
    samples: Samples,
    stored_dtype: torch.dtype,
) -> QuantReport:
    """The report with its weights tuned, and the other parameters that moved with them; the model itself stays as it is.

    The teacher is what the model says now, kept as what its head reads.
    """
    start = time.perf_counter()
    decoders = Decoders(report.weights)
    parameters = tunable_parameters(model, sites, tuning, stored_dtype)
    objective = _ModelObjective(model, decoders, samples)
    found = tuning.descend("model", {**decoders.start, **parameters}, objective)
    return replace(
        report,
        weights=decoders.stored(found.tensors),
        parameters={name: found.tensors[name] for name, own in parameters.items() if found.tensors[name] is not own},
        tuning=_table(found),
        tune_seconds=time.perf_counter() - start,
        flags=(*report.flags, *found.flags),
    )


def tuning_bytes(sites: Sequence[Site]) -> int:
    """What a tuning of the whole model holds beside the model and its activations, at least: every layer decoded, in float32, and
    a gradient as large."""
    return sum(2 * torch.float32.itemsize * site.num_weights for site in sites)


def tunable_parameters(
    model: PreTrainedModel, sites: Sequence[Site], tuning: Tuning, stored_dtype: torch.dtype
) -> dict[str, Tensor]:
    """The parameters that are tuned beside the layers' own tensors, by name, in the dtype that they are stored in.

    The vectors in the blocks of `sites` and the biases of `sites`; with `whole_towers` all of their towers but the weights of
    `sites` and the token embedding; with `embeddings` that and the head too.
    """
    blocks = {block_name(block) for block in by_block(sites) if block[0].block is not None}
    towers, in_scope, ends = find_towers(model), {site.tower for site in sites}, embeddings(model)
    weights, biases = ({f"{site.name}.{role}" for site in sites} for role in ("weight", "bias"))
    found = {}
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") in ends:
            taken = tuning.embeddings
        elif tuning.whole_towers:
            taken = name not in weights and towers.of(name) in in_scope
        else:
            taken = name in biases or (parameter.ndim <= 1 and any(name.startswith(f"{block}.") for block in blocks))
        if taken and parameter.is_floating_point():
            found[name] = as_stored(parameter.detach(), stored_dtype)
    return found


class Decoders:
    """Layers as functions of what is tunable in them; a tensor that several of them hold is one."""

    def __init__(self, weights: Mapping[Site, QuantizedWeight]) -> None:
        self.start: dict[str, Tensor] = {}  # by LAYER.ROLE of the first layer that holds it
        self._weights = weights
        self._decoders = {site: _quick(weight) for site, weight in weights.items()}
        self._keys: dict[Site, dict[str, str]] = {}
        names: dict[int, str] = {}
        for site, weight in weights.items():
            held = weight.tunable
            self._keys[site] = {role: names.setdefault(id(tensor), f"{site.name}.{role}") for role, tensor in held.items()}
            self.start |= {self._keys[site][role]: tensor for role, tensor in held.items()}

    def __call__(self, values: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "_ _"]]:
        """The decoded weights by the names of the model's parameters, with a graph to the values."""
        own = {site: {role: values[key] for role, key in keys.items()} for site, keys in self._keys.items()}
        return {f"{site.name}.weight": decode(own[site]) for site, decode in self._decoders.items()}

    def stored(self, tensors: Mapping[str, Tensor]) -> dict[Site, QuantizedWeight]:
        """The weights with these tensors, the very same where none of theirs is another; codes are as they were."""
        found = {}
        for site, weight in self._weights.items():
            moved = {role: tensors[key] for role, key in self._keys[site].items() if tensors[key] is not self.start[key]}
            loaded: Any = type(weight)
            found[site] = loaded.load({**weight.tensors(), **moved}, **weight.settings()) if moved else weight
        return found


def _quick(weight: QuantizedWeight) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The weight's decoder; where it is linear in a few numbers, as in one scale, the sum of what stands for each of them.

    A rotated layer is turned back once instead of at every step then.
    """
    decode, start = weight.decoder(), weight.tunable
    if not weight.is_linear or sum(tensor.numel() for tensor in start.values()) > _FEW:
        return decode
    parts: list[tuple[str, int, Tensor]] = []
    for role, tensor in start.items():
        for at in range(tensor.numel()):
            unit = {name: torch.zeros_like(other, dtype=torch.float32) for name, other in start.items()}
            unit[role].view(-1)[at] = 1
            parts.append((role, at, decode(unit)))

    def weighted(tensors: Mapping[str, Tensor]) -> Tensor:
        (role, at, part), *others = parts
        total = part * tensors[role].view(-1)[at]
        for role, at, part in others:
            total = total + part * tensors[role].view(-1)[at]
        return total

    return weighted


class _Answers(nn.Module):
    """The model's logits at its answers, as a module whose parameters are the model's."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: AnyBatch) -> Float[Tensor, "answers vocabulary"]:
        return answer_logits(self.model, batch)


class _ModelObjective:
    """The mean divergence of the answers from those that the model gives when this is made, nats a token, eq. (tuning)."""

    def __init__(self, model: PreTrainedModel, decoders: Decoders, samples: Samples) -> None:
        self._model, self._answers, self._decoders = model, _Answers(model), decoders
        self._batches, self._heldout = ([on_device(b, model) for b in part] for part in (samples.batches, samples.heldout))
        with torch.no_grad():
            self._taught, self._taught_heldout = (
                [answer_states(model, batch) for batch in part] for part in (self._batches, self._heldout)
            )

    @property
    def num_batches(self) -> int:
        return len(self._batches)

    def tokens(self, batch: int) -> int:
        return int(self._batches[batch].valid_mask.sum())

    def loss(self, values: Mapping[str, Tensor], batch: int) -> Float[Tensor, ""]:
        return self._divergences(_in_place(self._model, self._decoders, values), self._batches[batch], self._taught[batch]).mean()

    @torch.no_grad()
    def heldout(self, values: Mapping[str, Tensor]) -> float:
        parameters = _in_place(self._model, self._decoders, values)
        pairs = zip(self._heldout, self._taught_heldout, strict=True)
        return _mean([self._divergences(parameters, *pair) for pair in pairs])

    def _divergences(self, parameters: Mapping[str, Tensor], batch: AnyBatch, taught: Tensor) -> Float[Tensor, "answers"]:
        given = {f"model.{name}": value for name, value in parameters.items()}
        logs = torch.func.functional_call(self._answers, given, (batch,)).log_softmax(-1)
        with torch.no_grad():
            expected = logits(self._model, taught).log_softmax(-1)
        return (expected.exp() * (expected - logs)).sum(-1)


@dataclass
class BlockTuner:
    """Tunes blocks behind the quantised ones before them, and leaves them so in the model."""

    model: PreTrainedModel
    sites: Sequence[Site]
    tuning: Tuning
    table_groups: Sequence[TableGroup]
    stored_dtype: torch.dtype
    parameters: dict[str, Tensor] = field(default_factory=dict)  # those that have moved, as they are stored
    tables: list[pd.DataFrame] = field(default_factory=list)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The parameters that blocks are tuned in are afterwards what they are now."""
        own = {name: self.model.get_parameter(name).detach().clone() for name in self._parameters(self.sites)}
        try:
            yield
        finally:
            for name, value in own.items():
                self.model.get_parameter(name).data.copy_(value)

    def __call__(self, block: Block, visits: Sequence[Visit], rounded: Rounded, flags: list[str]) -> Rounded:
        """The block, whose rounded layers are in the model, tuned: `visits` are of the batches and of the held-out ones.

        Layers that share a table with other blocks stay as they are.
        """
        shared = {s.site for g in self.table_groups if any(s.site not in block for s in g.slices) for s in g.slices}
        decoders = Decoders({site: rounded.stored[site] for site in block if site not in shared})
        parameters = self._parameters(block)
        objective = _BlockObjective(self.model, block, decoders, *visits)
        found = self.tuning.descend(visits[0].name, {**decoders.start, **parameters}, objective)
        flags += found.flags
        self.tables.append(_table(found, block))
        moved = {name: found.tensors[name] for name, start in parameters.items() if found.tensors[name] is not start}
        self.parameters |= moved
        for name, value in moved.items():
            self.model.get_parameter(name).data.copy_(value)
        stored = decoders.stored(found.tensors)
        decoded = {site: weight.decode() for site, weight in stored.items()}
        install(self.model, decoded)
        return Rounded(stored, decoded)

    def _parameters(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        return tunable_parameters(self.model, sites, self.tuning, self.stored_dtype)


class _BlockObjective:
    """The squared error of a block's output over the squared output at full precision, a mean over tokens, eq. (block-tuning)."""

    def __init__(self, model: PreTrainedModel, block: Block, decoders: Decoders, visit: Visit, heldout: Visit) -> None:
        self._model, self._decoders = model, decoders
        self._tower: Tower = block[0].tower
        self._visit, self._heldout = visit, heldout
        self._expected, self._expected_heldout = visit.kept(), heldout.kept()

    @property
    def num_batches(self) -> int:
        return len(self._expected)

    def tokens(self, batch: int) -> int:
        return len(self._visit.tokens(self._visit.calls["quantized"][batch], self._expected[batch], self._tower))

    def loss(self, values: Mapping[str, Tensor], batch: int) -> Float[Tensor, ""]:
        parameters = _in_place(self._model, self._decoders, values)
        return self._errors(self._visit, batch, parameters, self._expected[batch]).mean()

    @torch.no_grad()
    def heldout(self, values: Mapping[str, Tensor]) -> float:
        parameters = _in_place(self._model, self._decoders, values)
        return _mean([self._errors(self._heldout, n, parameters, expected) for n, expected in enumerate(self._expected_heldout)])

    def _errors(self, visit: Visit, number: int, parameters: Mapping[str, Tensor], expected: Tensor) -> Float[Tensor, "tokens"]:
        call = visit.calls["quantized"][number]
        given, wanted = (visit.tokens(call, v, self._tower).float() for v in (visit.answer(call, parameters), expected))
        return (given - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-30)


def _in_place(model: PreTrainedModel, decoders: Decoders, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What stands in place of the model's parameters, by name, as they are held: decoded weights, and values of their own."""
    own = {key: value for key, value in values.items() if key not in decoders.start}
    return {name: value.to(model.get_parameter(name)) for name, value in {**decoders(values), **own}.items()}


def _mean(losses: Sequence[Float[Tensor, "tokens"]]) -> float:
    """The mean over all tokens; NaN where there are none."""
    return float(torch.cat(list(losses)).double().mean()) if losses else math.nan


def _table(found: Descended, block: Block | None = None) -> pd.DataFrame:
    place = {"tower": block[0].tower, "block": block[0].block, "site": block[0].name} if block else {}
    table = pd.DataFrame([{**dict.fromkeys(("tower", "block", "site")), **place, **row} for row in found.rows])
    table["chosen"] = table.index == (table.heldout_loss.idxmin() if table.heldout_loss.notna().any() else 0)
    return table
