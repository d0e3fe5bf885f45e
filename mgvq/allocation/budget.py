"""What the policies share: the legal rates, the rates worth climbing, and the climb within the budget."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mgvq.errors import UserError
from mgvq.types import RateTable

_KV = ("k_proj", "v_proj")  # the kinds of layer that `min_bits_kv` is about
_DEAD = 2.0**-40  # the least score that counts, over the largest: a dead channel has a logarithm too, some 20 bits lower


def check_positive(**settings: Any) -> None:
    """Raises UserError for a setting of `allocation` that is neither None nor a finite number > 0."""
    for name, value in settings.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (value is None or (number and 0 < value < math.inf)):
            raise UserError(f"allocation.{name} must be a number > 0 or null, got {value!r}")


def legal_rates(table: RateTable, budget_bits: int, min_bits: float | None, min_bits_kv: float | None) -> Bool[Tensor, "u r"]:
    """Return which rates have the index bits that the floors ask for (`min_bits_kv`: of k_proj and v_proj alone).

    Raises UserError where a floor is above every rate or about no table group, and where the cheapest legal choice exceeds the
    budget.
    """
    offered = [rate.index_bits for rate in table.rates]
    if min_bits_kv is not None and not any(table_group.kind in _KV for table_group in table.table_groups):
        raise UserError(f"allocation.min_bits_kv={min_bits_kv:g} has no effect: no layer in scope is a {' or '.join(_KV)}.")
    floors = {"min_bits": min_bits, "min_bits_kv": min_bits_kv}
    given = {name: floor for name, floor in floors.items() if floor is not None}
    for name, floor in given.items():
        if floor > max(offered):
            raise UserError(
                f"allocation.{name}={floor:g} is above the highest rate of this codebook, {table.rates[-1].name} with "
                f"{max(offered):g} index bits. Lower it, or null: no floor."
            )
    least = [max(min_bits or 0, (min_bits_kv or 0) if table_group.kind in _KV else 0) for table_group in table.table_groups]
    legal = torch.tensor([[bits >= floor for bits in offered] for floor in least], dtype=torch.bool)
    cost = int(table.bits.masked_fill(~legal, torch.iinfo(table.bits.dtype).max).amin(1).sum())
    if cost > budget_bits:
        held = " and ".join(f"allocation.{name}={floor:g}" for name, floor in given.items())
        what = f"the cheapest rate of every table group{' that ' + held + ' allows' if held else ''}"
        raise below_smallest(table, budget_bits, what, cost, ", or lower the floors" if held else "")
    return legal


def below_smallest(table: RateTable, budget_bits: int, smallest: str, cost: int, also: str = "") -> UserError:
    """Return the error of a budget that is too small: `smallest` names the choice of `cost` bits, `also` another way out."""
    return UserError(
        f"budget.bits_per_weight={per_weight(table, budget_bits):.4g} is below the smallest rate of this codebook: {smallest} "
        f"stores {per_weight(table, cost):.3f} bits a weight on these {len(table.table_groups)} table groups. "
        f"Raise the budget{also}."
    )


def per_weight(table: RateTable, bits: int) -> float:
    """Bits over the weights of all table groups."""
    return bits / sum(table_group.num_weights for table_group in table.table_groups)


def sizes(table: RateTable) -> Float[Tensor, "u"]:
    """The number of weights of every table group, in float64."""
    return torch.tensor([table_group.num_weights for table_group in table.table_groups], dtype=torch.float64)


def log_density(table: RateTable) -> Float[Tensor, "u"]:
    """log2 of the score a weight, over its geometric mean over all weights: 0 on average, whatever the scale of the scores.

    A score a weight is what a bit a weight acts on, so that table groups of unequal size compare. Where all scores are 0 it is 0.
    """
    density = torch.tensor([table_group.score for table_group in table.table_groups], dtype=torch.float64) / sizes(table)
    if not density.any():
        return density
    logs = density.clamp(min=_DEAD * density.max().item()).log2()
    return logs - (logs @ sizes(table)) / sizes(table).sum()


def parts(table: RateTable, within: Literal["model", "layer"]) -> list[Bool[Tensor, "u"]]:
    """Which table groups are compared with each other: one mask for all of the model, or one for each layer.

    Where layers share tables, a table group belongs to the layer of its first channel slice.
    """
    if within == "model":
        return [torch.ones(len(table.table_groups), dtype=torch.bool)]
    numbers: dict[tuple[str, str, int | None], int] = {}
    layer = torch.tensor([numbers.setdefault((u.tower, u.kind, u.block), len(numbers)) for u in table.table_groups])
    return [layer == number for number in range(len(numbers))]


Key = Callable[[int, int, int], Any]


def climb(table: RateTable, ladders: Sequence[Sequence[int]], key: Key, budget_bits: int) -> Int[Tensor, "u"]:
    """Start every table group u on the first rate of its ladder and take upgrades by ascending `key(u, lower, upper)`.

    An upgrade that no longer fits is left out, and with it the later ones of its table group. Ties go by the order of the table
    groups. `ladders` must rise in bits, and `key` must not fall along them.
    """
    bits = table.bits.tolist()
    steps = [(key(u, *step), u, i, step) for u, rungs in enumerate(ladders) for i, step in enumerate(pairwise(rungs))]
    choice = [rungs[0] for rungs in ladders]
    left = budget_bits - sum(row[rate] for row, rate in zip(bits, choice, strict=True))
    for _, u, _, (lower, upper) in sorted(steps):
        extra = bits[u][upper] - bits[u][lower]
        if choice[u] == lower and extra <= left:
            choice[u], left = upper, left - extra
    return torch.tensor(choice)


def round_wishes(table: RateTable, wish: Float[Tensor, "u"], legal: Bool[Tensor, "u r"], budget_bits: int) -> Int[Tensor, "u"]:
    """Round `wish + level` index bits to legal rates, at the highest level that fits the budget in exact stored bits.

    The turn of an upgrade comes where the level lifts its table group past the midpoint of the two rates. Bits that are left buy
    the next upgrades that fit, in the same order. Ties go to the higher score a weight, then by the order of the table groups.
    Only differences of wishes count.
    """
    offered = [rate.index_bits for rate in table.rates]
    wishes, density = wish.tolist(), log_density(table).tolist()

    def turn(u: int, lower: int, upper: int) -> tuple[float, float]:
        return round((offered[lower] + offered[upper]) / 2 - wishes[u], 9), -density[u]  # rounded: equal on paper is a tie

    ladders = [_ladder(offered, bits, fit) for bits, fit in zip(table.bits.tolist(), legal.tolist(), strict=True)]
    return climb(table, ladders, turn, budget_bits)


def _ladder(offered: Sequence[float], bits: Sequence[int], legal: Sequence[bool]) -> list[int]:
    """Return the legal rates that rise in index bits and in stored bits, where no other is as fine and as cheap."""
    rungs: list[int] = []
    for rate in sorted((r for r, fit in enumerate(legal) if fit), key=lambda r: (-offered[r], bits[r])):
        if not rungs or bits[rate] < bits[rungs[-1]]:
            rungs.append(rate)
    return rungs[::-1]


def slope(bits: Sequence[int], loss: Sequence[float], lower: int, upper: int) -> float:
    """The loss that an upgrade saves for each stored bit."""
    return (loss[lower] - loss[upper]) / (bits[upper] - bits[lower])


def hull(bits: Sequence[int], loss: Sequence[float], legal: Sequence[bool]) -> list[int]:
    """Return the legal rates on the lower convex hull of (bits, loss), from the cheapest to the least loss; slopes fall."""
    rungs: list[int] = []
    for rate in sorted((r for r, fit in enumerate(legal) if fit), key=lambda r: (bits[r], loss[r])):
        if rungs and loss[rate] >= loss[rungs[-1]]:
            continue
        while len(rungs) > 1 and slope(bits, loss, rungs[-2], rungs[-1]) <= slope(bits, loss, rungs[-1], rate):
            rungs.pop()
        rungs.append(rate)
    return rungs
