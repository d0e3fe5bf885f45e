"""Gradients of a row of blocks, each of which is brought into memory twice: once forward, once backward.

Forward, what every block puts out is written to files, sample by sample. Behind the last block the gradient of the losses with
respect to its output is taken; then, from the last block to the first, each runs again with a graph of its own, from what went
into it and the gradient of what came out. That is the chain rule of one pass through all of them, operation by operation, so that
what is made of the gradients has the bits that it has by `passes.forward`.
"""

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mgvq.model.answers import answer_states
from mgvq.model.blocks import Block, block_name
from mgvq.model.hooks import after_forward
from mgvq.model.passes import LossOf, back, seen, through_head
from mgvq.model.walk import BlockWalk, Call
from mgvq.progress import progress
from mgvq.ranks.ranks import ALONE, Ranks
from mgvq.types import Site

See = Callable[[Site, Tensor], object]
"""Is shown what a layer reads."""
Gradients = Mapping[str, Tensor]
"""Of the losses by their names, with respect to the hidden states between two blocks."""


@runtime_checkable
class Receiver(Protocol):
    """Is shown what goes through the layers of one block, batch by batch."""

    def see(self, number: int, site: Site, inputs: Tensor) -> object:
        """What the layer reads of the batch of that number, float32; once for the layers that read the same."""

    def add(self, number: int, kind: str, site: Site, inputs: Tensor, gradient: Tensor) -> object:
        """The gradient of the loss of that name with respect to what the layer has made of these inputs, float32."""


R = TypeVar("R", bound=Receiver)


class Boundaries:
    """What the blocks of a row have put out, in files of a process's own folder in `scratch`: empty before, gone afterwards."""

    def __init__(self, scratch: Path, ranks: Ranks = ALONE) -> None:
        self._scratch, self._ranks = scratch, ranks
        self._folder = self._of(ranks.rank)
        self._beside: dict[tuple[int, int], Any] = {}  # what a block puts out besides its hidden states

    def __enter__(self) -> "Boundaries":
        shutil.rmtree(self._folder, ignore_errors=True)  # of a run that was killed
        if self._ranks.rank == 0:  # which may have had more processes
            number = self._ranks.size
            while (left := self._of(number)).exists():
                shutil.rmtree(left, ignore_errors=True)
                number += 1
        self._folder.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def keep(self, place: int, number: int, outputs: Sequence[Any]) -> None:
        """What the block at that place of the row has put out for the batch of that number, in the one call that there is.

        Raises RuntimeError where there are several.
        """
        if len(outputs) > 1:
            raise RuntimeError("a block of a row is called several times in a pass: whose gradient is whose cannot be told.")
        (output,) = outputs
        self._beside[place, number] = None if isinstance(output, Tensor) else output[1:]
        hidden = output if isinstance(output, Tensor) else output[0]
        save_file({"hidden": hidden.contiguous().cpu()}, self._file(place, number))

    def output(self, place: int, number: int, device: torch.device) -> Any:
        """The same, read back."""
        hidden, beside = load_file(self._file(place, number))["hidden"].to(device), self._beside[place, number]
        return hidden if beside is None else (hidden, *beside)

    def _of(self, rank: int) -> Path:
        return self._scratch / f"activations-{rank}"

    def _file(self, place: int, number: int) -> Path:
        return self._folder / f"{place:04}-{number:06}.safetensors"


def relays(walk: BlockWalk, row: Sequence[Block]) -> bool:
    """Whether the row is one that this can do: blocks of one tower that follow each other, each read by the next one alone."""
    first = row[0][0]
    numbers = [first.block or 0, *(block[0].block or 0 for block in row[1:])]
    follow = numbers == list(range(numbers[0], numbers[0] + len(row))) and {block[0].tower for block in row} == {first.tower}
    return len(row) > 1 and follow and walk.is_chain([block_name(block) for block in row])


class Relay:
    """Gradients of a row of blocks that `relays`, with what each puts out in `boundaries`.

    The blocks of the walk before the row are settled, those of the row are not. `look` makes what is shown the inputs of a
    block's layers in the order of a forward pass, of each batch anew.
    """

    def __init__(
        self, walk: BlockWalk, row: Sequence[Block], boundaries: Boundaries, look: Callable[[], See] = lambda: lambda *_: None
    ) -> None:
        self.walk, self.row, self.boundaries, self.look = walk, row, boundaries, look
        self.names = [block_name(block) for block in row]

    def received(
        self,
        losses: Mapping[int, Callable[[], Mapping[str, LossOf]]],
        wanted: Collection[Block],
        receiver: Callable[[Block], R],
        alone: Iterable[int] = (),
    ) -> Iterator[tuple[Block, R]]:
        """The wanted blocks of the row, from the last to the first, with what has received them; the walk is then as it was.

        `losses` of batches by their numbers in the walk, each asked for when it is taken; the batches `alone` run forward, and
        are seen. Raises RuntimeError for a block that is called several times in a pass.
        """
        walk, begin, numbers = self.walk, self.names[0], sorted({*losses, *alone})
        if walk.kept(begin)[0]:  # blocks of the tower before the row: what they put out is computed once, and kept
            for number in numbers:
                walk.run_until(number, begin)
        before = walk.kept(begin)
        reached = self._forward(numbers)
        gradients = self._behind(losses)
        first = min((place for place, block in enumerate(self.row) if block in wanted), default=len(self.row))
        try:
            for place in progress(range(len(self.row) - 1, first - 1, -1), "blocks of gradients"):
                receives = receiver(self.row[place]) if self.row[place] in wanted else None
                block = _Backward(self, place, before, receives)
                for number in reached:
                    found = block.run(number, gradients.get(number, {}), graph=number in losses)
                    gradients[number] = {kind: walk.put(gradient) for kind, gradient in found.items()}
                del block
                if receives is not None:
                    yield self.row[place], receives
                del receives  # while the next one is made
        finally:
            walk.rewind(begin, *before)

    def _forward(self, numbers: Sequence[int]) -> Sequence[int]:
        """Run every block but the last, and keep what it puts out; those of the batches that come to the row."""
        walk, reached = self.walk, numbers
        for place, block in enumerate(progress(self.row[:-1], "blocks of activations")):
            walk.settle(block)
            for number in reached:
                with self._looking(block):
                    walk.run_until(number, self.names[place + 1])
                if outputs := walk.outputs(number, self.names[place]):
                    self.boundaries.keep(place, number, outputs)
            reached = [number for number in reached if walk.outputs(number, self.names[place])]
        return reached

    def _behind(self, losses: Mapping[int, Callable[[], Mapping[str, LossOf]]]) -> dict[int, Gradients]:
        """The gradients with respect to what the row's last block puts out, by batch, none where it is not called."""
        walk, last = self.walk, self.row[-1]
        walk.settle(last)
        found = dict[int, Gradients]()
        for number in progress(list(losses), "batches of losses"):
            leaves: list[Tensor] = []

            def begin(_module: nn.Module, _args: Any, output: Any, leaves: list[Tensor] = leaves) -> Any:
                hidden = output if isinstance(output, Tensor) else output[0]
                leaves.append(hidden.detach().requires_grad_())
                return leaves[-1] if isinstance(output, Tensor) else (leaves[-1], *output[1:])

            with (
                self._looking(last),
                walk.passing(number) as batch,
                torch.enable_grad(),
                after_forward(walk.model, {self.names[-1]: begin}),
            ):
                states = answer_states(walk.model, batch)
            at_states = through_head(walk.model, states, losses[number]())
            if leaves:
                kinds = list(at_states)
                found[number] = {
                    kind: walk.put(back([states], [gradient], leaves, last=kind == kinds[-1])[0])
                    for kind, gradient in at_states.items()
                }
        return found

    @contextmanager
    def _looking(self, block: Block) -> Iterator[None]:
        """Show what the layers of the block read."""
        see = self.look()

        def shown(site: Site) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], _output: Tensor) -> None:
                see(site, args[0])

            return hook

        with after_forward(self.walk.model, {site.name: shown(site) for site in block}):
            yield


class _Backward:
    """The block at a place of the row, run with a graph of its own, batch by batch."""

    def __init__(
        self, relay: Relay, place: int, before: tuple[list[str], dict[tuple[int, str], list[Any]]], receiver: Receiver | None
    ) -> None:
        """`before`: what the walk had kept before the row (`BlockWalk.kept`)."""
        self._walk, self._boundaries, self._look = relay.walk, relay.boundaries, relay.look
        self._block, self._earlier, self._name = relay.row[place], relay.names[:place], relay.names[place]
        self._before, self._receiver = before, receiver
        self._module = self._walk.model.get_submodule(self._name)

    def run(self, number: int, gradients: Gradients, *, graph: bool) -> Gradients:
        """Run the batch and go back through it from the gradients of the block's output; those of what went in."""
        receiver = self._receiver
        if receiver is None and not graph:
            return {}
        call, look = self._call(number), self._look()

        def see(site: Site, inputs: Tensor) -> None:
            if receiver is not None:
                look(site, inputs)
                receiver.see(number, site, inputs)

        hidden = call.hidden.detach()
        wanted = bool(graph and self._earlier)  # before the first block nobody asks for more
        args, kwargs = call.with_hidden(hidden.requires_grad_() if wanted else hidden)
        with self._walk.weights.whole_graph(self._name), seen(self._walk.model, self._block, see, graph=graph) as at_sites:
            returned = self._module(*args, **kwargs)
        if not graph:
            return {}
        output = returned if isinstance(returned, Tensor) else returned[0]
        sites, kinds = list(at_sites.outputs) if receiver is not None else [], list(gradients)
        asked = [*(at_sites.outputs[site] for site in sites), *([hidden] if wanted else [])]
        found = {kind: back([output], [gradients[kind]], asked, last=kind == kinds[-1]) for kind in kinds}
        at_sites.outputs.clear()  # what the block has computed makes room for the products
        del returned, output, asked
        if receiver is not None:
            for kind, own in found.items():
                for site, gradient in zip(sites, own, strict=False):
                    receiver.add(number, kind, site, at_sites.inputs[site.reads], gradient.float())
        return {kind: own[-1] for kind, own in found.items()} if wanted else {}

    def _call(self, number: int) -> Call:
        """The block's call in a pass over the batch."""
        settled, outputs = self._before
        if self._earlier:
            device = self._walk.batches[number].loss_mask.device
            output = self._boundaries.output(len(self._earlier) - 1, number, device)
            settled, outputs = [*settled, *self._earlier], {(number, self._earlier[-1]): [output]}
        self._walk.rewind(self._name, settled, outputs)
        call = self._walk.call(number, self._name)
        assert call is not None, "the batch has come to the row before"
        return call
