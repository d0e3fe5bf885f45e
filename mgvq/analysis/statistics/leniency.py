"""How often the studies' test rejects a true null, by the number of seeds: simulated, not promised.

`experiments/simulate_null` writes the shares, as JSON beside this module and as the table `results/tables/null_simulation.md`.
With two seeds the spread between seeds has one degree of freedom, and the test errs more than twice as often as it says where
seeds matter: p values below .05 are then no more than suggestive.
"""

import functools
import json
from collections.abc import Iterable
from pathlib import Path

RATES = Path(__file__).with_name("null_rates.json")
TABLE = "results/tables/null_simulation.md"
ALPHA = 0.05
_TOO_OFTEN = 2  # times ALPHA


def null_rate(num_seeds: int) -> float | None:
    """The share of true nulls that have p < .05, of the kind of differences for which it is largest; None where that number of
    seeds was not simulated."""
    return _rates().get(num_seeds)


def is_lenient(num_seeds: int) -> bool:
    """Whether the test of so many seeds rejects true nulls at least twice as often as it says. One seed is another claim, about
    questions alone, and more than were simulated are better than those."""
    rate = null_rate(num_seeds)
    return rate is not None and rate >= _TOO_OFTEN * ALPHA


def told_lenient(num_seeds: Iterable[int]) -> str:
    """The warning for comparisons over so many seeds; empty where the test of each keeps about what it promises."""
    lenient = sorted({number for number in num_seeds if is_lenient(number)})
    if not lenient:
        return ""
    worst, fewest = max(null_rate(number) or 0.0 for number in lenient), min(set(_rates()) - set(lenient))
    return (
        f"With {' or '.join(map(str, lenient))} seeds the test is too lenient: where nothing differs it has p < {ALPHA:g} in up "
        f"to {100 * worst:.1f} % of studies ({TABLE}), so such a p counts as suggestive and decides nothing; {fewest} seeds or "
        "more do."
    )


@functools.cache
def _rates() -> dict[int, float]:
    kinds = json.loads(RATES.read_text(encoding="utf-8"))["kinds"].values()
    return {int(seeds): max(shares[seeds]["null"] for shares in kinds) for seeds in next(iter(kinds))}
