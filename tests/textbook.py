"""Published methods as textbooks have them, slow and in float64, and the small layer that they are asked about.

The layer's statistics are sums over its tokens, and the textbook sees tokens, gradients and weights only; of vector codebooks it
is given the table.
"""

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from hydra import compose, initialize_config_dir

from mgvq.curvature.statistics import sketch
from mgvq.formats.vector import centroids
from mgvq.quantization import pipeline, storage
from mgvq.quantization.codebooks import CodebookCache
from mgvq.quantization.method import Method
from mgvq.quantization.rounding import LayerRounder
from mgvq.quantization.table_groups import cut_table_groups
from mgvq.rotation import rotate_matrix
from mgvq.runs.method import build_method
from mgvq.runs.places import conf_folder
from mgvq.types import MODALITIES, Site, SiteStats

NUM_OUT, NUM_IN, SAMPLES, TOKENS = 8, 12, 6, 16  # half of a sample's tokens are of its image
DAMPING = 0.01
QUARTERS = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64)
SEEDS = pytest.mark.parametrize("seed", [0, 100, 200])


@functools.cache
def preset(*overrides: str) -> Method:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        method = build_method(compose("config", list(overrides)))
    assert method is not None
    return method


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Layer:
    """A weight, what it reads, and the gradients of the answer loss at its outputs."""

    weight: torch.Tensor
    x: torch.Tensor  # samples, tokens, in: first those of the image
    g: torch.Tensor  # samples, tokens, out

    @property
    def all_x(self):
        return self.x.double().flatten(0, 1)

    @property
    def all_g(self):
        return self.g.double().flatten(0, 1)

    def moment(self):
        return self.all_x.T @ self.all_x / len(self.all_x)

    def stats(self, method):
        """The statistics as mgvq.curvature.statistics collects them; sampled and right labels are the same here."""
        half = self.x.shape[1] // 2
        parts = dict(zip(MODALITIES, (slice(0, half), slice(half, None)), strict=True))
        xs = {m: self.x.double()[:, p].flatten(0, 1) for m, p in parts.items()}
        gs = {m: self.g.double()[:, p].flatten(0, 1) for m, p in parts.items()}
        per_sample = torch.einsum("sto,sti->soi", self.g.double(), self.x.double())
        h_in, h_out = (torch.einsum(e, per_sample, per_sample) for e in ("soi,soj->ij", "soi,spi->op"))
        channel_gram = None
        if groups := method.needs.channel_groups:
            weights = [run.mean(1) for run in self.all_g.square().chunk(groups, 1)]
            channel_gram = torch.stack([(self.all_x * w[:, None]).T @ self.all_x for w in weights]).float()
        return SiteStats(
            num_tokens={m: len(t) for m, t in xs.items()},
            gram={m: (t.T @ t).float() for m, t in xs.items()},
            num_answers=SAMPLES,
            fisher={m: (t.T @ t).float() for m, t in gs.items()},
            saliency={m: float(t.abs().mean()) for m, t in gs.items()},
            gradient=(per_sample.sum(0) / SAMPLES).float(),
            channel_gram=channel_gram,
            sequence=sketch(h_in.float(), h_out.float(), SAMPLES),
        )


def layer(seed=0, num_out=NUM_OUT, num_in=NUM_IN):
    """Channels of unequal size that go together, gradients of both signs."""
    mix = normal(num_in, num_in, seed=seed + 1) * torch.linspace(0.5, 2, num_in)
    x = normal(SAMPLES, TOKENS, num_in, seed=seed + 2) @ mix
    g = normal(SAMPLES, TOKENS, num_out, seed=seed + 3) @ normal(num_out, num_out, seed=seed + 4)
    return Layer(normal(num_out, num_in, seed=seed), x, g)


def loud(item, factor=30.0):
    """Two input channels with large activations."""
    x = item.x.clone()
    x[..., [3, 7]] *= factor
    return replace(item, x=x)


def quiet_images(item):
    """Image tokens: large activations of their own, whose gradients are small."""
    half = TOKENS // 2
    x, g = item.x.clone(), item.g.clone()
    x[:, :half] *= torch.linspace(4, 0.25, item.x.shape[2])
    g[:, :half] *= 0.02
    return replace(item, x=x, g=g)


def quantized(method, *layers, bits=2.0, rate=None):
    """The decoded weights at one rate, and each layer's codebooks; all layers read what the first one reads."""
    names = "qkvo"
    sites = [Site(names[i], "language", names[i], 0, *item.weight.shape, reads="qkv") for i, item in enumerate(layers)]
    weights, bank = (
        {s: f(item) for s, item in zip(sites, layers, strict=True)} for f in (lambda i: i.weight, lambda i: i.stats(method))
    )
    problems = pipeline.layer_problems(weights, bank, method)
    table_groups = cut_table_groups(problems, method.codebook)
    cache = CodebookCache(table_groups, method.codebook, problems)
    rate = next(r for r in method.codebook.rates() if r.name == rate or (rate is None and r.index_bits == bits))
    if shift := method.shift:
        cache = cache.with_targets(
            {s: shift.target(p.weight, shift.direction(p.metric, bank[s].gradient), shift.steps[-1]) for s, p in problems.items()}
        )
    # Without a refit: that of GPTVQ and others has its own oracle (test_refit.py).
    rounder = LayerRounder(cache, [rate] * len(table_groups), method.compensation, None, storage.group_ids(problems))
    stored = rounder.round(sites, []).stored
    return [stored[s].decode().double() for s in sites], [cache(u, rate)[0][0] for u in range(len(table_groups))]


def one(method, item):
    return quantized(method, item)[0][0]


def rotated(method, item):
    """The layer as its rotation makes it, token by token, and the rotation."""
    site = Site("q", "language", "q", 0, *item.weight.shape, reads="qkv")
    turn = method.transform([site], None)[site]
    eyes = [torch.eye(n, dtype=torch.float64) for n in item.weight.shape]
    u, v_transposed = rotate_matrix(eyes[0], turn.outputs, None), rotate_matrix(eyes[1], None, turn.inputs)
    return Layer(turn.weight(item.weight), item.x.double() @ v_transposed, item.g.double() @ u.T), turn


def cost(error, hessian):
    return float(((error @ hessian) * error).sum())


def damped(hessian, share=DAMPING):
    return hessian + share * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def weighted_moment(x, weights):
    return sum(w * torch.outer(t, t) for w, t in zip(weights, x, strict=True))


def unit_lower(hessian, length):
    """`H = L D L^T`, L unit block lower triangular: block by block, by elimination."""
    rest, lower, blocks = hessian.clone(), torch.eye(len(hessian), dtype=torch.float64), []
    for at in range(0, len(hessian), length):
        own = slice(at, at + length)
        blocks.append(rest[own, own].clone())
        lower[at:, own] = rest[at:, own] @ torch.linalg.inv(blocks[-1])
        rest = rest - lower[:, own] @ blocks[-1] @ lower[:, own].T * (torch.arange(len(hessian)) >= at)[:, None]
    return lower, blocks


def grid_scales(weight, scale_bits, counts=None):
    """Of every row: the best of 2^scale_bits scales between the smallest and the largest that rows would choose themselves.

    The best by squared errors, of which each channel's counts with its entry of `counts`.
    """
    counts = torch.ones(weight.shape[1]) if counts is None else counts

    def error(row, scale):
        return sum(float((scale * QUARTERS - w).abs().min()) ** 2 * float(c) for w, c in zip(row.double(), counts, strict=True))

    own = []
    for row in weight:
        tries = [float(row.abs().max()) / 1.5 * 2 ** (-i / 4) for i in range(12)]
        own.append(min(tries, key=lambda scale: error(row, scale)))
    low, high = (float(torch.tensor(s).half()) for s in (min(own), max(own)))
    top = 2**scale_bits - 1
    levels = [float(torch.tensor(low * (high / low) ** (i / top)).half()) for i in range(top + 1)]
    return torch.tensor([min(levels, key=lambda scale: error(row, scale)) for row in weight], dtype=torch.float64)


def nearest_level(column, scales):
    levels = scales[:, None] * QUARTERS
    return levels.gather(1, (levels - column[:, None]).abs().argmin(1, keepdim=True))[:, 0]


def nearest_on_grid(weight, scales):
    return torch.stack([nearest_level(column, scales) for column in weight.double().T], 1)


def by_size(power):
    return power.argsort(descending=True).tolist()


def gptq_loop(weight, hessian, order, choose):
    """Frantar et al. 2023, Algorithm 1 without lazy batches: `choose(column)` quantises a column."""
    weight, order = weight.double()[:, order], torch.as_tensor(order)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(hessian)[order][:, order]), upper=True)
    done = torch.zeros_like(weight)
    for q in range(len(order)):
        done[:, q] = choose(weight[:, q])
        error = (weight[:, q] - done[:, q]) / upper[q, q]
        weight[:, q:] -= error[:, None] * upper[q, q:]
    result = torch.empty_like(done)
    result[:, order] = done
    return result


def pairs(num_in):
    return [(c, c + 1) for c in range(0, num_in, 2)]


def table_of(codebook):
    codebook = getattr(codebook, "transposed", codebook)
    return centroids(codebook.table, codebook.step).double()


def best_continuation(row, hessian, table, vectors):
    """Vector by vector the entry with which the best real-valued choice of all that follows costs least."""
    row, value, fixed = row.double(), torch.zeros(len(row), dtype=torch.float64), []
    for vector in vectors:
        fixed = fixed + list(vector)
        rest = [c for c in range(len(row)) if c not in fixed]
        form = hessian[fixed][:, fixed]
        if rest:
            form = form - hessian[fixed][:, rest] @ torch.linalg.solve(hessian[rest][:, rest], hessian[rest][:, fixed])
        costs = []
        for entry in table:
            value[list(vector)] = entry
            error = (row - value)[fixed]
            costs.append(float(error @ form @ error))
        value[list(vector)] = table[costs.index(min(costs))]
    return value


def same_codes(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


LDLQ_ALONE = (
    "sensitivity=uniform",
    "transform=none",
    "compensation=hessian",
    "compensation.damping=0.01",
    "codebook.vector_length=2",
)
SMALL_TILES = (
    "sensitivity=uniform",
    "transform=none",
    "codebook=kmeans",
    "codebook.table=int8",
    *(f"compensation.{d}={DAMPING}" for d in ("damping", "output_damping")),
)
