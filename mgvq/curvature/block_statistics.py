"""The statistics of the layers of one block after the other, for models whose statistics do not fit into memory together.

The sums are those of `statistics.collect`, taken over the same batches in the same order, and have the same bits.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from transformers import PreTrainedModel

from mgvq.curvature.statistics import StatisticsSums, Watch, check_reached
from mgvq.model.blocks import Block, by_block
from mgvq.model.passes import Rows
from mgvq.model.walk import BlockWalk, on_device
from mgvq.model.weights import Weights
from mgvq.types import Batch, Needs, Site, StatsBank


def collect_grams(
    model: PreTrainedModel,
    weights: Weights,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    needs: Needs,
    is_finished: Callable[[Block], bool],
) -> Iterator[tuple[Block, StatsBank]]:
    """Give the statistics of a block once all batches have gone through it; `needs` asks for nothing but Grams.

    Blocks that `is_finished` are gone through and not given. What is kept of the batches is what the block before has put out.
    Raises UserError and RuntimeError as `statistics.collect` does, but for answers that are NaN behind sound layers.
    """
    held = [on_device(batch, model) for batch in batches]
    rows = [Rows.of(batch) for batch in held if isinstance(batch, Batch)]
    walk, watch, reached = BlockWalk(model, sites, held, weights), Watch(), set[Site]()
    for block in by_block(sites):
        visit, sums, finished = walk.visit(block, {}), StatisticsSums(needs), is_finished(block)
        # A first token has no position before it that would predict it (`answer_states`).
        sums.num_answers = sum(int(batch.loss_mask[:, 1:].sum()) for batch in held)
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
        reached |= {site for site in block if sums.reached(site)}
        if not finished:
            yield block, {site: sums.stats(site, None) for site in block}
    check_reached(sites, reached)
