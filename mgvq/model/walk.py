"""The block walk: what goes into and comes out of every block, over all batches, as the blocks are quantised one by one.

Gradients and held-out losses of the block loop go through here, so that how a pass comes about can change in one place. `visit`
is for what is done to one block behind the quantised prefix: its statistics, and its tuning.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from mgvq.memory import in_file
from mgvq.model.answers import answer_states
from mgvq.model.blocks import Block, block_name, modules_before, rows_of_blocks
from mgvq.model.hooks import after_forward, before_forward, outputs_of
from mgvq.model.lazy import Lazy
from mgvq.model.pack import PackedBatch
from mgvq.model.weights import InModel, Weights
from mgvq.types import Batch, Site, Tower

AnyBatch = Batch | PackedBatch
PrefixName = Literal["full_precision", "quantized"]


def on_device(batch: AnyBatch, model: PreTrainedModel) -> AnyBatch:
    """The batch where the model is, with a packed one's mask in the model's dtype."""
    return batch.to(model.device, model.dtype) if isinstance(batch, PackedBatch) else batch.to(model.device)


@dataclass(frozen=True)
class Call:
    """One call of a block in a forward pass."""

    number: int  # of the batch
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The hidden states that go in."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other hidden states."""
        if self.args:
            return (hidden, *self.args[1:]), dict(self.kwargs)
        return (), {**self.kwargs, "hidden_states": hidden}


@dataclass(frozen=True)
class BlockPass:
    """What a call of a block left behind."""

    call: Call
    inputs: Mapping[str, Tensor]  # of the watched modules, by their names inside the block
    returned: Any  # the block's output as its class gives it: a tensor, or a tuple that begins with it

    @property
    def output(self) -> Tensor:
        """The hidden states that come out."""
        return self.returned if isinstance(self.returned, Tensor) else self.returned[0]


@dataclass
class _Kept:
    """What is settled under one prefix, and the outputs of it: in every row those of the last settled module alone."""

    settled: list[str]
    outputs: dict[tuple[int, str], list[Any]] = field(default_factory=dict)  # by batch and name, call by call
    put: Callable[[Tensor], Tensor] = lambda tensor: tensor  # to where it is kept


class BlockWalk:
    """Walks the blocks of a model over `batches`, which it runs and no one else does.

    A block is *settled* once its weights stay as they are. Passes then begin behind the last settled block of every tower: its
    output is computed once more for every batch and kept, and neither it nor the blocks before it run again. Modules that ran
    before any of `sites`, a tower out of scope say, are settled from the beginning and stay so.

    Two prefixes are kept apart. `quantized` is the model as it is now, the blocks before quantised. `full_precision` is what the
    blocks put out before they were: `visit` keeps it, for whoever compares the two.

    Where something else reads what a block puts out than the next one of its tower (the features of a layer before the last in
    LLaVA-1.5, those of several layers in Qwen3-VL), every settled block plays its own output; else the last one's is enough.

    `weights`: where the weights of `sites` are; None: in the model. `probe`: the batch that shows how the model hangs together;
    None: the last of `batches`; that of all where these are the share of one of several processes. `like`: a walk over other
    batches, which has found that out; None: two passes and one for every tower find it. `aside`: a folder whose files hold what
    is kept of the blocks; None: memory does.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        batches: Sequence[AnyBatch],
        weights: Weights | None = None,
        probe: AnyBatch | None = None,
        like: "BlockWalk | None" = None,
        aside: Path | None = None,
    ) -> None:
        self.model, self.batches, self.weights, self._aside = model, batches, weights or InModel(model), aside
        if aside is not None:
            aside.mkdir(parents=True, exist_ok=True)
        self._probe = batches[-1] if probe is None and batches else probe  # most images: the first may have none
        self._static = self._static_modules(sites) if like is None else like._static
        if like is not None:
            self._row, self._playing = like._row, like._playing
        else:
            alone = [*self._static, *(site.name for site in sites if site.block is None)]
            self._row = {name: row for row in [*([name] for name in alone), *rows_of_blocks(sites)] for name in row}
            self._playing = dict(self._row)  # the row in which a block's output may stand for those of the blocks before it
            for row in self._not_chains(rows_of_blocks(sites)):
                self._playing |= {name: [name] for name in row}
        self._kept = {prefix: _Kept(list(self._static), put=self.put) for prefix in get_args(PrefixName)}
        self._visited: list[str] = []

    def put(self, values: Tensor) -> Tensor:
        """The same numbers where what is kept of the blocks is."""
        return values if self._aside is None else in_file(values, self._aside)

    def _static_modules(self, sites: Sequence[Site]) -> list[str]:
        if self._probe is None:
            return []
        with torch.no_grad(), modules_before(self.model, sites) as static:
            answer_states(self.model, self._probe)
        return static

    @torch.no_grad()
    def _not_chains(self, rows: Sequence[list[str]]) -> list[list[str]]:
        """The rows in which something else than the next block reads what a block puts out: the last one's output is not all that
        counts."""
        rows, probe = [row for row in rows if len(row) > 1], self._probe
        if not rows or probe is None:
            return []

        def answer(kept: _Kept) -> Tensor:
            self._kept = {"quantized": kept}
            with self._behind_settled(-1, "quantized"):
                return answer_states(self.model, probe)

        computed = _Kept([name for row in rows for name in row])
        expected = answer(computed)
        # Towers are played one by one: the played output of a later one would hide what is wrong with an earlier one's.
        return [row for row in rows if not torch.equal(expected, answer(_Kept(row, dict(computed.outputs))))]

    def settle(self, block: Block) -> None:
        """The weights of the block, and of all blocks before it, stay as they are until `unsettle`."""
        if block[0].block is not None:
            self._kept["quantized"].settled.append(block_name(block))

    def unsettle(self) -> None:
        """The weights of all blocks may change again, and the walk begins anew with the first block."""
        self._visited = []
        for kept in self._kept.values():
            kept.settled = list(self._static)
            kept.outputs = {key: outputs for key, outputs in kept.outputs.items() if key[1] in self._static}

    def is_chain(self, names: Sequence[str]) -> bool:
        """Whether what each of these blocks of a row puts out is read by the next one alone."""
        return all(self._playing[name] is self._row[name] and len(self._row[name]) > 1 for name in names)

    @torch.no_grad()
    def run_until(self, number: int, name: str) -> None:
        """Run the batch of that number from behind what is settled to where the block `name` begins."""
        with self.passing(number) as batch, before_forward(self.model, {name: _stop}), suppress(_Stop):
            answer_states(self.model, batch)

    def run_through(self, number: int, name: str) -> None:
        """Run the batch of that number to where the first call of the block `name` ends, with a graph where one is wanted."""
        with self.passing(number) as batch, after_forward(self.model, {name: _stop}), suppress(_Stop):
            answer_states(self.model, batch)

    def outputs(self, number: int, name: str) -> list[Any]:
        """What the last settled block of a row has put out in a pass over the batch, call by call; nothing where none came."""
        return self._kept["quantized"].outputs.get((number, name), [])

    def kept(self, name: str) -> tuple[list[str], dict[tuple[int, str], list[Any]]]:
        """What is settled of the row of a block, and the outputs of it that are kept: what `rewind` takes."""
        kept, names = self._kept["quantized"], self._row[name]
        own = {key: outputs for key, outputs in kept.outputs.items() if key[1] in names}
        return [name for name in kept.settled if name in names], own

    def rewind(self, row: str, settled: Sequence[str], outputs: Mapping[tuple[int, str], list[Any]]) -> None:
        """Of the row of a block these are settled and no others; their outputs, by batch and name, are those."""
        kept, names = self._kept["quantized"], self._row[row]
        kept.settled = [*(name for name in kept.settled if name not in names), *settled]
        kept.outputs = {key: own for key, own in kept.outputs.items() if key[1] not in names} | dict(outputs)

    @torch.no_grad()
    def call(self, number: int, name: str) -> Call | None:
        """The first call of the block in a pass over the batch, which ends there."""
        calls: list[Call] = []

        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(Call(number, args, kwargs))
            raise _Stop

        with self.passing(number) as batch, before_forward(self.model, {name: record}), suppress(_Stop):
            answer_states(self.model, batch)
        return calls[0] if calls else None

    @contextmanager
    def passing(self, number: int, prefix: PrefixName = "quantized") -> Iterator[AnyBatch]:
        """Stands around a forward pass of the batch of that number, which begins behind what is settled."""
        with self._behind_settled(number, prefix):
            yield self.batches[number]

    @contextmanager
    def _behind_settled(self, number: int, prefix: PrefixName) -> Iterator[None]:
        """The same for what is called by that number."""
        kept = self._kept[prefix]
        modules = {name: self.model.get_submodule(name) for name in kept.settled}
        own = {name: vars(module).get("forward") for name, module in modules.items()}
        for name, module in modules.items():
            module.forward = _Player(kept, self._playing[name], number, name, module.forward)
        try:
            yield
        finally:
            for name, module in modules.items():
                if (forward := own[name]) is None:
                    del module.forward  # the class has its own
                else:
                    module.forward = forward  # a block that is read when it runs

    def visit(self, block: Block, full_precision: Mapping[Site, Tensor]) -> "Visit":
        """The block as it is called after the blocks before it, at full precision and as they are now.

        Every block is visited once, in order, until `unsettle`, and run at full precision (`Visit.run`) before
        the next one is; `full_precision` holds the weights of its own layers.
        """
        if left := [name for name in self._visited if name not in self._kept["full_precision"].settled]:
            raise AssertionError(f"{left} were visited and not run at full precision")
        self._visited.append(block_name(block))
        return Visit(self, block, full_precision)

    @torch.no_grad()  # not inference mode, whose tensors no later graph may hold
    def calls(self, block: Block, prefix: PrefixName) -> list[Call]:
        """Every call of the block in passes over all batches, which end where the next block of its tower begins."""
        calls: list[Call] = []
        number, name = 0, block_name(block)
        is_first = name == self._row[name][0]  # what goes into the others is kept as what comes out of a block

        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = Call(number, args, kwargs)
            calls.append(Call(number, *call.with_hidden(self.put(call.hidden))) if is_first else call)

        behind = self._row[name][self._row[name].index(name) + 1 :][:1]
        hooks = {name: record, **dict.fromkeys(behind, _stop)}
        for number in range(len(self.batches)):
            with self.passing(number, prefix) as batch, before_forward(self.model, hooks), suppress(_Stop):
                answer_states(self.model, batch)
        return calls


class Visit:
    """One block of a walk: its calls under both prefixes, and passes of the block alone."""

    def __init__(self, walk: BlockWalk, block: Block, full_precision: Mapping[Site, Tensor]) -> None:
        self._walk, self.name = walk, block_name(block)
        self.module = walk.model.get_submodule(self.name)
        prefixes: tuple[PrefixName, ...] = get_args(PrefixName)
        # Those of one prefix at a time: whoever has come to the quantised one is done with full precision.
        self.calls: Mapping[PrefixName, list[Call]] = Lazy(prefixes, lambda p: walk.calls(block, p), together=lambda p: p)
        self._full_precision = full_precision

    def run(
        self, prefix: PrefixName, watch: Sequence[str] = (), *, graph: bool = False, whole: bool = True
    ) -> Iterator[BlockPass]:
        """The block's passes, call by call: at full precision with its own weights, else with those that the model has now.

        `watch` names modules inside the block whose inputs are wanted; `graph` keeps the graph, for a backward pass from an
        output. Without `whole` a pass ends where it has come to all of `watch`, and has no output. The first whole run at full
        precision keeps what the block puts out, from where the walk goes on.
        """
        passes = self._run(prefix, self.calls[prefix], watch, graph, whole)
        kept, row = self._walk._kept[prefix], self._walk._playing[self.name]
        if prefix == "quantized" or self.name in kept.settled or not whole:
            yield from passes
            return
        outputs: dict[int, list[Any]] = {}
        for one in passes:
            kept_one = replace(one, returned=_put(kept, one.returned))
            outputs.setdefault(one.call.number, []).append(kept_one.returned)
            yield kept_one
        for number, calls in outputs.items():
            _keep(kept, row, number, self.name, calls)
        kept.settled.append(self.name)

    def first(self, prefix: PrefixName, watch: Sequence[str] = ()) -> Iterator[BlockPass]:
        """The pass of the first call alone; nothing where there is no call."""
        return self._run(prefix, self.calls[prefix][:1], watch, False, True)

    def kept(self) -> list[Tensor]:
        """What the block put out at full precision, call by call, once it has run so; whoever reads it writes nothing into it."""
        outputs = self._walk._kept["full_precision"].outputs
        calls = [one for number in range(len(self._walk.batches)) for one in outputs.get((number, self.name), [])]
        return [one if isinstance(one, Tensor) else one[0] for one in calls]

    def answer(self, call: Call, parameters: Mapping[str, Tensor]) -> Tensor:
        """The block's output for a call with these in place of parameters of the model, by their names in the model, with a graph
        wherever it is wanted."""
        own = {name.removeprefix(f"{self.name}."): value for name, value in parameters.items()}
        returned = torch.func.functional_call(self.module, own, call.args, dict(call.kwargs))
        return returned if isinstance(returned, Tensor) else returned[0]

    def tokens(self, call: Call, values: Float[Tensor, "*b c"], tower: Tower) -> Float[Tensor, "tokens c"]:
        """The rows of real tokens among values that the block of a tower has for a call."""
        if tower != "language":  # towers without padding
            return values.flatten(0, -2)
        return values[self._walk.batches[call.number].valid_mask]

    def outputs(self, prefix: PrefixName, names: Sequence[str]) -> dict[str, Tensor]:
        """The outputs of modules inside the block in the pass of its first call."""
        with outputs_of(self.module, names) as seen:
            list(self.first(prefix))
        return seen

    def _run(
        self, prefix: PrefixName, calls: Sequence[Call], watch: Sequence[str], graph: bool, whole: bool
    ) -> Iterator[BlockPass]:
        seen: dict[str, Tensor] = {}

        def note(name: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if args or "hidden_states" in kwargs:
                    seen[name] = args[0] if args else kwargs["hidden_states"]
                if not whole and len(seen) == len(watch):
                    raise _Stop

            return hook

        with before_forward(self.module, {name: note(name) for name in watch}), self._weights_of(prefix):
            for call in calls:
                seen.clear()
                returned = None
                with torch.enable_grad() if graph else torch.no_grad(), suppress(_Stop):
                    returned = self.module(*call.args, **call.kwargs)
                yield BlockPass(call, dict(seen), returned)

    @contextmanager
    def _weights_of(self, prefix: PrefixName) -> Iterator[None]:
        if prefix == "quantized":
            yield
            return
        with self._walk.weights.at_full_precision(self._full_precision):
            yield


class _Stop(Exception):
    """Ends a forward pass that has seen what it was for."""


def _stop(*_: Any) -> None:
    raise _Stop


class _Player:
    """Stands in for the `forward` of a settled module in one pass; one that is called several times is played in that order."""

    def __init__(self, kept: _Kept, row: Sequence[str], number: int, name: str, run: Any) -> None:
        self._kept, self._row, self._number, self._name, self._run = kept, row, number, name, run
        self._played = _find(kept, row, number, name)
        self._outputs: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        played = self._played
        output = _put(self._kept, self._run(*args, **kwargs)) if played is None else played[len(self._outputs)]
        self._outputs.append(output)
        if played is None:
            _keep(self._kept, self._row, self._number, self._name, self._outputs)
        return _fresh(output)


def _find(kept: _Kept, row: Sequence[str], number: int, name: str) -> list[Any] | None:
    """The kept outputs of the module, or of one behind it in its row, whose input then does not matter."""
    return next((kept.outputs[number, n] for n in row[row.index(name) :] if (number, n) in kept.outputs), None)


def _put(kept: _Kept, output: Any) -> Any:
    """What a module has put out, its hidden states where they are kept."""
    if isinstance(output, Tensor):
        return kept.put(output)
    if type(output) is tuple and output and isinstance(output[0], Tensor):
        return (kept.put(output[0]), *output[1:])
    return output  # of a tower out of scope, whatever its class gives


def _keep(kept: _Kept, row: Sequence[str], number: int, name: str, outputs: list[Any]) -> None:
    for earlier in row[: row.index(name)]:
        kept.outputs.pop((number, earlier), None)
    kept.outputs[number, name] = outputs


def _fresh(output: Any) -> Any:
    """Models write into what a part returns (Qwen2-VL splits its tower's features there): what is kept stays as it was."""
    return output if isinstance(output, Tensor) else copy.copy(output)
