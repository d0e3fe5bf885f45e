"""The statistics of the layers of one block after the other, for models whose statistics do not fit into memory together.

The sums are those of `statistics.collect`, taken over the same batches in the same order, and have the same bits.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from mgvq.curvature.statistics import StatisticsSums, Watch, check_reached, collect, losses
from mgvq.model.answers import num_answers
from mgvq.model.blocks import Block, by_block
from mgvq.model.passes import Rows
from mgvq.model.relay import Boundaries, Relay, relays
from mgvq.model.walk import BlockWalk
from mgvq.model.weights import Weights
from mgvq.progress import progress
from mgvq.ranks.ranks import ALONE, Ranks
from mgvq.types import Batch, Needs, Site, StatsBank


def collect_by_block(
    model: PreTrainedModel,
    weights: Weights,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    needs: Needs,
    seed: int,
    further: Iterable[Batch],
    is_finished: Callable[[Block], bool],
    scratch: Path,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[Block, StatsBank]]:
    """What `statistics.collect` gives of the same arguments, block by block; those that `is_finished` are left out.

    Grams take one pass through all blocks, which keeps of the batches what the block before has put out. Where `needs` asks for
    gradients, the blocks of a tower are gone through forward and then backward (`Relay`), with what each puts out in files of
    `scratch`, a folder that is gone afterwards. Where that cannot be (`relays`), a block takes a forward and a backward pass
    through all blocks behind it, as a refreshed gradient does in the block loop. Several processes (`ranks`) are all given all
    batches, and find the same blocks finished. Raises UserError and RuntimeError as `collect` does, but not for answers that are
    NaN behind sound layers where Grams are all there is.
    """
    whole = [list(batches), list(further) if needs.gram else []]
    first, more = ([batch.to(model.device) for batch in ranks.share(part)] for part in whole)
    held, probe = [*first, *more], next(part[-1] for part in reversed(whole) if part).to(model.device)
    walk = BlockWalk(model, sites, held, weights, probe, aside=scratch if weights.streamed else None)
    if replace(needs, gram=False, clip=None) == Needs():
        yield from _grams(walk, sites, needs, is_finished, ranks)
        return
    behind, behind_more = _Behind(walk, range(len(first))), _Behind(walk, range(len(first), len(held)))
    reached = {site for block in by_block(sites) if is_finished(block) for site in block}  # an earlier start has found that

    asked = {number: partial(losses, needs, batch, seed) for number, batch in enumerate(first)}

    def receiver(_: Block) -> _Received:
        sums = StatisticsSums(needs, walk.put)
        sums.num_answers = sum(map(num_answers, first))
        return _Received(held, sums)

    def found(row: Sequence[Block]) -> Iterator[tuple[Block, StatsBank]]:
        if all(map(is_finished, row)):
            pass
        elif len(row) > 1:
            with Boundaries(scratch, ranks) as boundaries:
                missing = [block for block in row if not is_finished(block)]
                relay = Relay(walk, row, boundaries, Watch)
                for block, received in relay.received(asked, missing, receiver, alone=range(len(first), len(held))):
                    received.sums.add_up(ranks)
                    bank = {site: received.sums.stats(site, None) for site in block}
                    del received  # while the next ones are made
                    yield block, bank
                    del bank
        else:
            (block,) = row
            yield block, collect(model, block, behind, needs, seed, behind_more, whole=False, ranks=ranks)
        for block in row:
            walk.settle(block)

    for row in _rows(walk, sites, needs):  # of which there is often one: its own loops say how far they are
        for block, bank in found(row):
            reached |= {site for site in block if any(bank[site].num_tokens.values())}
            yield block, bank
            del bank
    check_reached(sites, reached)


def _rows(walk: BlockWalk, sites: Sequence[Site], needs: Needs) -> list[list[Block]]:
    """The blocks in their order, those together through which gradients are relayed."""
    rows: list[list[Block]] = []
    for block in by_block(sites):
        if rows and not needs.power_rounds and relays(walk, [*rows[-1], block]):  # rounds take several passes
            rows[-1].append(block)
        else:
            rows.append([block])
    return rows


@dataclass(frozen=True)
class _Received:
    """What the sums of a block receive from a relay."""

    batches: Sequence[Batch]
    sums: StatisticsSums

    def see(self, number: int, site: Site, inputs: Tensor) -> None:
        self.sums.add_inputs(self._rows[number], site, inputs)

    def add(self, number: int, kind: str, site: Site, inputs: Tensor, gradient: Tensor) -> None:
        self.sums.add_gradient(kind, self._rows[number], site, inputs, gradient)

    @cached_property
    def _rows(self) -> Sequence[Rows]:
        return [Rows.of(batch) for batch in self.batches]


@dataclass(frozen=True)
class _Behind(Collection[Batch]):
    """Batches of a walk, whose passes begin behind what is settled while they are looked at."""

    walk: BlockWalk
    numbers: range

    def __iter__(self) -> Iterator[Batch]:
        for number in self.numbers:
            with self.walk.passing(number) as batch:
                assert isinstance(batch, Batch), "statistics are taken of batches that are not packed"
                yield batch

    def __len__(self) -> int:
        return len(self.numbers)

    def __contains__(self, batch: object) -> bool:
        return any(self.walk.batches[number] is batch for number in self.numbers)


def _grams(
    walk: BlockWalk, sites: Sequence[Site], needs: Needs, is_finished: Callable[[Block], bool], ranks: Ranks
) -> Iterator[tuple[Block, StatsBank]]:
    held = [batch for batch in walk.batches if isinstance(batch, Batch)]  # statistics are taken of batches that are not packed
    rows, watch, reached = [Rows.of(batch) for batch in held], Watch(), set[Site]()
    for block in progress(list(by_block(sites)), "blocks of statistics"):
        visit, sums, finished = walk.visit(block, {}), StatisticsSums(needs, walk.put), is_finished(block)
        sums.num_answers = sum(map(num_answers, held))
        names = {site: site.name.removeprefix(visit.name).removeprefix(".") for site in block}
        for one in visit.run("full_precision", list(names.values())):
            firsts: dict[str, Site] = {}
            for site, name in names.items():
                if name not in one.inputs:
                    continue
                first = firsts.setdefault(site.reads, site)
                if one.inputs[names[first]] is not one.inputs[name]:
                    raise RuntimeError(f"{first.name} and {site.name} are said to read the same ({site.reads}), but do not.")
                if first is site:
                    watch(site, x := one.inputs[name].detach().float())
                    sums.add_inputs(rows[one.call.number], site, x)
        sums.add_up(ranks)
        reached |= {site for site in block if sums.reached(site)}
        if not finished:
            yield block, {site: sums.stats(site, None) for site in block}
    check_reached(sites, reached)
