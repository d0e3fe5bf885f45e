"""The mean squared error of every code on a Gaussian of variance 1.

`python experiments/distortion/measure.py`, minutes on one core, writes mgvq/codebook/distortion.json: for every code and rate the
best scales of its points (found on one sample) and the distortion with its standard error (measured on another). Fixed seeds: a
second run writes the same file.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numba
import numpy as np
import torch
from scipy.optimize import minimize, minimize_scalar
from scipy.special import ndtr, ndtri
from torch import Tensor

import mgvq
from mgvq.codebook.lloyd import kmeans
from mgvq.codebook.nearest import Nearest
from mgvq.lattice import coding as lattice
from mgvq.rng import generator
from mgvq.trellis import coding as trellis
from mgvq.trellis.code import STEPS, Values, trellis_code

LENGTH = 256  # weights of a trellis sequence
NUM_SCALING, NUM_MEASURING = 1 << 15, 1 << 18
KMEANS_SAMPLE, KMEANS_ITERATIONS, MAX_CENTROIDS = 1024, 60, 256
STATE_BITS = (8, 10, 12, 14)


def gaussian(name: str, count: int, length: int) -> Tensor:
    return torch.randn(count // length, length, generator=generator(0, "distortion", name))


def record(x: Tensor, coded: Tensor, scales: Sequence[float] = ()) -> dict[str, object]:
    """The distortion of rows that were coded apart, and the standard error of their mean."""
    rows = (x - coded).square().mean(1).double()
    error = float(rows.std() / math.sqrt(len(rows)))
    return {"distortion": round(float(rows.mean()), 6), "error": round(error, 6), "scales": [round(s, 4) for s in scales]}


def trellis_rates(state_bits: int, values: Values) -> dict[str, object]:
    small, large = gaussian("scaling", NUM_SCALING, LENGTH), gaussian("measuring", NUM_MEASURING, LENGTH)
    found = {}
    for rate in STEPS:
        code = trellis_code(rate, state_bits, values)

        def coded(x: Tensor, scale: float, code=code) -> Tensor:
            return trellis.decode(trellis.encode(x / scale, code), code, LENGTH) * scale

        scale = minimize_scalar(
            lambda s, coded=coded: float((small - coded(small, s)).square().mean()),
            bounds=(0.6, 1.2), method="bounded", options={"xatol": 0.01},
        ).x  # fmt: skip
        found[str(rate)] = record(large, coded(large, float(scale)), [float(scale)])
    return found


def lattice_rates() -> dict[str, object]:
    small, large = gaussian("scaling", 2 * NUM_SCALING, 8), gaussian("measuring", 4 * NUM_MEASURING, 8)
    found = {}
    for bits, stages in lattice.STAGES.items():

        def coded(x: Tensor, scales: Sequence[float], bits=bits) -> Tensor:
            return lattice.decode(lattice.encode(x, bits, scales), bits, scales)

        best = minimize(
            lambda s, coded=coded: float((small - coded(small, np.exp(s).tolist())).square().mean()),
            np.log([0.97, 0.3][: len(stages)]), method="Nelder-Mead", options={"xatol": 0.003, "fatol": 1e-7, "maxfev": 60},
        ).x  # fmt: skip
        found[str(float(bits))] = record(large, coded(large, np.exp(best).tolist()), np.exp(best).tolist())
    return found


def kmeans_rates(length: int) -> dict[str, object]:
    large = gaussian("measuring", 4 * NUM_MEASURING, length)
    found = {}
    for rate in STEPS:
        if (num_centroids := round(2 ** (rate * length))) <= MAX_CENTROIDS:
            sample = gaussian(f"k-means {length} {rate}", KMEANS_SAMPLE * num_centroids * length, length)
            centroids = kmeans(sample, num_centroids, generator(0, "seeds"), iterations=KMEANS_ITERATIONS).centroids
            found[str(rate)] = record(large, centroids[Nearest(centroids)(large).long()])
    return found


def lloyd_max(levels: int) -> float:
    """The least squared error of a scalar code: levels at the means of their cells, edges halfway between levels."""
    points = ndtri((np.arange(levels) + 0.5) / levels)
    while True:
        edges = np.concatenate([[-np.inf], (points[1:] + points[:-1]) / 2, [np.inf]])
        mass = np.diff(ndtr(edges))
        moved = -np.diff(np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)) / mass
        if np.abs(moved - points).max() < 1e-12:
            return float(1 - (mass * moved**2).sum())
        points = moved


def lloyd_max_rates() -> dict[str, object]:
    bits = (rate for rate in STEPS if rate == int(rate))
    return {str(r): {"distortion": round(lloyd_max(2 ** int(r)), 6), "error": 0.0, "scales": []} for r in bits}


def main() -> None:
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    work: dict[str, Callable[[], dict[str, object]]] = {
        "lloyd_max": lloyd_max_rates,
        "kmeans_2": lambda: kmeans_rates(2),
        "kmeans_4": lambda: kmeans_rates(4),
        "lattice": lattice_rates,
    }
    for values in ("computed", "hybrid"):
        for bits in STATE_BITS:
            work[f"trellis_{values}_{bits}"] = lambda bits=bits, values=values: trellis_rates(bits, values)
    table = {}
    for name, measure in work.items():
        start = time.perf_counter()
        table[name] = measure()
        row = "  ".join(f"{rate}: {entry['distortion']:.4f}" for rate, entry in table[name].items())
        print(f"{name:20} {row}  ({time.perf_counter() - start:.0f} s)", flush=True)
    path = Path(mgvq.__file__).parent / "codebook" / "distortion.json"
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
