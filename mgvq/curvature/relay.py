"""Statistics with gradients of a row of blocks, each of which is brought into memory twice: once forward, once backward.

Forward, what every block puts out is written to files, sample by sample. Behind the last block the gradient of the answers' loss
with respect to its output is taken; then, from the last block to the first, each runs again with a graph of its own, from what
went into it and the gradient of what came out. That is the chain rule of one pass through all of them, operation by operation, so
that the sums have the bits of `statistics.collect`.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mgvq.curvature.statistics import StatisticsSums, Watch, losses, watched
from mgvq.model.answers import answer_states
from mgvq.model.blocks import Block, block_name
from mgvq.model.hooks import after_forward
from mgvq.model.passes import Rows, back, seen, through_head
from mgvq.model.walk import BlockWalk, Call
from mgvq.progress import progress
from mgvq.types import Batch, Needs


class Boundaries:
    """What the blocks of a row have put out, in files of a folder that is empty before and gone afterwards."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._beside: dict[tuple[int, int], Any] = {}  # what a block puts out besides its hidden states

    def __enter__(self) -> "Boundaries":
        shutil.rmtree(self._folder, ignore_errors=True)  # of a run that was killed
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

    def _file(self, place: int, number: int) -> Path:
        return self._folder / f"{place:04}-{number:06}.safetensors"


def relays(walk: BlockWalk, row: Sequence[Block], needs: Needs) -> bool:
    """Whether the row is one that this can do: blocks that follow each other, each read by the next one alone, and statistics
    that one pass gives."""
    numbers = [block[0].block or 0 for block in row]
    follow = numbers == list(range(numbers[0], numbers[0] + len(row)))
    return len(row) > 1 and follow and not needs.power_rounds and walk.is_chain([block_name(block) for block in row])


def relay(
    walk: BlockWalk,
    row: Sequence[Block],
    num_first: int,
    needs: Needs,
    seed: int,
    is_finished: Callable[[Block], bool],
    boundaries: Boundaries,
) -> Iterator[tuple[Block, StatisticsSums]]:
    """The sums of the blocks that are not finished, from the last to the first; the row is settled in the end.

    The first `num_first` batches of the walk are those of the gradients, the others those that the Gram alone sees. Raises
    UserError and RuntimeError as `statistics.collect` does.
    """
    names = [block_name(block) for block in row]
    reached = _forward(walk, row, boundaries)
    gradients, num_answers = _behind(walk, row[-1], num_first, needs, seed)
    first = min((place for place, block in enumerate(row) if not is_finished(block)), default=len(row))
    for place in progress(range(len(row) - 1, first - 1, -1), "blocks of gradients"):
        sums = StatisticsSums(needs)
        sums.num_answers = num_answers
        finished = is_finished(row[place])
        block = _Backward(walk, row, place, boundaries, None if finished else sums)
        for number in reached:
            gradients[number] = block.run(number, gradients.get(number, {}), graph=number < num_first)
        del block
        if not finished:
            yield row[place], sums
    walk.rewind(names[0], names, {})


def _forward(walk: BlockWalk, row: Sequence[Block], boundaries: Boundaries) -> list[int]:
    """Run every block but the last, and keep what it puts out; the numbers of the batches that come to the row."""
    names, reached = [block_name(block) for block in row], list(range(len(walk.batches)))
    for place, block in enumerate(progress(row[:-1], "blocks of activations")):
        walk.settle(block)
        for number in reached:
            with _looking(walk.model, block):
                walk.run_until(number, names[place + 1])
            if outputs := walk.outputs(number, names[place]):
                boundaries.keep(place, number, outputs)
        reached = [number for number in reached if walk.outputs(number, names[place])]
    return reached


@contextmanager
def _looking(model: nn.Module, block: Block) -> Iterator[None]:
    """Watch what the layers of the block read."""
    watch = Watch()
    hooks = {site.name: lambda _module, args, _output, site=site: watch(site, args[0]) for site in block}
    with after_forward(model, hooks):
        yield


Gradients = Mapping[str, Tensor]
"""Of the loss under the labels of that name, with respect to the hidden states between two blocks."""


def _behind(walk: BlockWalk, last: Block, num_first: int, needs: Needs, seed: int) -> tuple[dict[int, Gradients], int]:
    """The gradients with respect to what the row's last block puts out, by batch, none where it is not called; how many answers
    there are."""
    walk.settle(last)
    found: dict[int, Gradients] = {}
    num_answers = 0
    for number in range(num_first):
        leaves: list[Tensor] = []

        def begin(_module: nn.Module, _args: Any, output: Any, leaves: list[Tensor] = leaves) -> Any:
            hidden = output if isinstance(output, Tensor) else output[0]
            leaves.append(hidden.detach().requires_grad_())
            return leaves[-1] if isinstance(output, Tensor) else (leaves[-1], *output[1:])

        module = walk.model.get_submodule(block_name(last))
        with _looking(walk.model, last), walk.passing(number) as batch, torch.enable_grad():
            handle = module.register_forward_hook(begin)
            try:
                states = answer_states(walk.model, batch)
            finally:
                handle.remove()
        assert isinstance(batch, Batch), "statistics are taken of batches that are not packed"
        at_states = through_head(walk.model, states, losses(needs, batch, seed))
        num_answers += len(states)
        if leaves:
            kinds = list(at_states)
            found[number] = {
                kind: back([states], [gradient], leaves, last=kind == kinds[-1])[0] for kind, gradient in at_states.items()
            }
    return found, num_answers


class _Backward:
    """One block of the row, run with a graph of its own, batch by batch."""

    def __init__(
        self, walk: BlockWalk, row: Sequence[Block], place: int, boundaries: Boundaries, sums: StatisticsSums | None
    ) -> None:
        self._walk, self._boundaries, self._sums = walk, boundaries, sums
        self._block, self._before = row[place], [block_name(block) for block in row[:place]]
        self._name = block_name(self._block)
        self._module = walk.model.get_submodule(self._name)

    def run(self, number: int, gradients: Gradients, *, graph: bool) -> Gradients:
        """Run the batch and go back through it from the gradients of the block's output; those of what went in."""
        if self._sums is None and not graph:
            return {}
        call, batch = self._call(number), self._walk.batches[number]
        assert isinstance(batch, Batch), "statistics are taken of batches that are not packed"
        rows = Rows.of(batch)
        see = (lambda *_: None) if self._sums is None else watched(partial(self._sums.add_inputs, rows))
        hidden = call.hidden.detach()
        wanted = bool(graph and self._before)  # before the first block nobody asks for more
        args, kwargs = call.with_hidden(hidden.requires_grad_() if wanted else hidden)
        with self._walk.weights.whole_graph(self._name), seen(self._walk.model, self._block, see, graph=graph) as at_sites:
            returned = self._module(*args, **kwargs)
        if not graph:
            return {}
        output = returned if isinstance(returned, Tensor) else returned[0]
        sites, kinds = list(at_sites.outputs), list(gradients)
        asked = [*at_sites.outputs.values(), *([hidden] if wanted else [])]
        found = {kind: back([output], [gradients[kind]], asked, last=kind == kinds[-1]) for kind in kinds}
        at_sites.outputs.clear()  # what the block has computed makes room for the products
        del returned, output, asked
        if self._sums is not None:
            for kind, own in found.items():
                for site, gradient in zip(sites, own, strict=False):
                    self._sums.add_gradient(kind, rows, site, at_sites.inputs[site.reads], gradient.float())
        return {kind: own[-1] for kind, own in found.items()} if wanted else {}

    def _call(self, number: int) -> Call:
        """The block's call in a pass over the batch."""
        kept: dict[tuple[int, str], list[Any]] = {}
        if self._before:
            device = self._walk.batches[number].loss_mask.device
            output = self._boundaries.output(len(self._before) - 1, number, device)
            kept = {(number, self._before[-1]): [output]}
        self._walk.rewind(self._name, self._before, kept)
        call = self._walk.call(number, self._name)
        assert call is not None, "the batch has come to the row before"
        return call
