"""How often does the studies' test find a difference that is not there, and one that is? Writes the table null_simulation, and
`mgvq/analysis/statistics/null_rates.json`, by which verdicts judge p values of few seeds.

Ten thousand made-up studies of every kind: differences of normal random effects, of right-or-wrong answers, of heavy-tailed
losses, with few and with many seeds. A null rejected at p < .05 is a mistake; a planted difference, of the size that the power
calculation names for 80 %, should be found four times in five. About three minutes on one core.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from mgvq.analysis.statistics.leniency import ALPHA, RATES
from mgvq.analysis.statistics.significance import Components, p_value, smallest_difference, two_way, variance_components
from mgvq.runs.places import results_folder

SEEDS = (2, 3, 5, 8)
CHUNK = 500
Draw = Callable[[np.random.Generator, int, int, int], np.ndarray]


def normal(seed: float, sample: float, residual: float) -> Draw:
    """Differences with normal effects of the given standard deviations."""

    def draw(rng: np.random.Generator, number: int, seeds: int, samples: int) -> np.ndarray:
        effects = rng.normal(0, seed, (number, seeds, 1)) + rng.normal(0, sample, (number, 1, samples))
        return effects + rng.normal(0, residual, (number, seeds, samples))

    return draw


def answers(rng: np.random.Generator, number: int, seeds: int, samples: int) -> np.ndarray:
    """Right or wrong of two arms of equal skill, four questions a picture, which each arm finds hard in its own way."""
    common = rng.normal(0.8, 1, (number, 1, samples, 4))
    arms = []
    for _ in range(2):
        own = rng.normal(0, 0.4, (number, 1, samples, 4)) + rng.normal(0, 0.05, (number, seeds, 1, 1))
        arms.append(common + own + rng.normal(0, 0.6, (number, seeds, samples, 4)) > 0)
    return (arms[0].astype(float) - arms[1]).mean(-1)


def losses(rng: np.random.Generator, number: int, seeds: int, samples: int) -> np.ndarray:
    """Log-normal losses of two arms of equal skill: a few questions make most of the sum."""
    common = rng.normal(-3, 1.2, (number, 1, samples))
    arms = []
    for _ in range(2):
        own = rng.normal(0, 0.4, (number, 1, samples)) + rng.normal(0, 0.03, (number, seeds, 1))
        arms.append(np.exp(common + own + rng.normal(0, 0.4, (number, seeds, samples))))
    return arms[0] - arms[1]


KINDS: dict[str, Draw] = {
    "normal, seeds .01, samples .2, rest .17": normal(0.01, 0.2, 0.17),
    "normal, seeds 0, samples .2, rest .17": normal(0.0, 0.2, 0.17),
    "normal, seeds .04, samples .2, rest .17": normal(0.04, 0.2, 0.17),
    "normal, seeds .04, samples 0, rest .17": normal(0.04, 0.0, 0.17),
    "right or wrong answers": answers,
    "heavy-tailed losses": losses,
}


def components(draw: Draw, samples: int) -> Components:
    """The standard deviations of a kind of study, from a few with many seeds."""
    found = [variance_components(d) for d in draw(np.random.default_rng(1), 50, 50, samples)]
    means = {f.name: float(np.mean([getattr(c, f.name) for c in found])) for f in fields(Components)}
    return Components(**means)


def rejected(draw: Draw, number: int, seeds: int, samples: int, planted: float) -> float:
    """Share of the studies with p < ALPHA when `planted` is added to every difference."""
    rng = np.random.default_rng(0)
    sizes = [min(CHUNK, number - at) for at in range(0, number, CHUNK)]
    return sum(float((p_value(*two_way(draw(rng, n, seeds, samples) + planted)) < ALPHA).sum()) for n in sizes) / number


def simulate(number: int, samples: int) -> dict[str, dict[str, dict[str, float]]]:
    """The share that is rejected by kind of differences, number of seeds, and `null` or `80 %`."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, draw in KINDS.items():
        spread, found[name] = components(draw, samples), {}
        for seeds in SEEDS:
            planted = smallest_difference(spread, num_seeds=seeds, num_samples=samples)
            shares = {what: rejected(draw, number, seeds, samples, at) for what, at in {"null": 0.0, "80 %": planted}.items()}
            found[name][str(seeds)] = shares
    return found


def table(rates: Mapping[str, Any]) -> str:
    """The table of what `main` has written, as Markdown."""
    columns = [(seeds, what) for seeds in next(iter(rates["kinds"].values())) for what in ("null", "80 %")]
    lines = [f"| differences | {' | '.join(f'{what}, {seeds} seeds' for seeds, what in columns)} |"]
    lines.append("|:---" * (1 + len(columns)) + "|")
    for name, shares in rates["kinds"].items():
        lines.append(f"| {name} | {' | '.join(f'{100 * shares[seeds][what]:.1f} %' for seeds, what in columns)} |")
    note = (
        f"Share of {rates['studies']:,} simulated studies of {rates['pictures']} pictures with p < .05. null: without a "
        "difference, so 5 % is right. 80 %: with the difference that the power calculation says is found four times in five."
    )
    return "\n".join(lines) + f"\n\n{note}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=10_000)
    parser.add_argument("--pictures", type=int, default=250)
    arguments = parser.parse_args()
    kinds = simulate(arguments.studies, arguments.pictures)
    rates = {"alpha": ALPHA, "studies": arguments.studies, "pictures": arguments.pictures, "kinds": kinds}
    RATES.write_text(json.dumps(rates, indent=1) + "\n", encoding="utf-8")
    path: Path = results_folder() / "tables" / "null_simulation.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table(rates), encoding="utf-8")
    print(RATES, path, sep="\n")


if __name__ == "__main__":
    main()
