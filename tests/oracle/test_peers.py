"""Every published method as its preset makes it, from tokens to codes, against a slow textbook version in float64.

Where the formulas were read: GPTQ, AWQ, MBQ, VPTQ, GPTVQ, FOEM, RSAVQ and YAQA as docs/method.md names them; QuIP#'s E8P and
block LDLQ in arXiv 2402.04396v2, sections 4.1 to 4.3; QTIP's codes, tail-biting and use of block LDLQ in arXiv 2406.11235,
sections 3.1, 3.2 and 4; LNQ's two steps (GuidedQuant, arXiv 2505.07004, algorithm 2) in a summary of that algorithm; AQLM's
text could not be read: what is tested is its objective with a search that is exact for every vector.

The layer is small, the statistics are sums over its tokens, and the textbook sees tokens, gradients and weights only; of vector
codebooks it is given the table. Then what each paper reports, on a case that suits it.
"""

import functools
import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import layer_problems
from hydra import compose, initialize_config_dir

from mgvq.allocation.uniform import Uniform
from mgvq.curvature.statistics import sketch
from mgvq.distortion import measured
from mgvq.formats.vector import centroids
from mgvq.lattice.points import e8p_points
from mgvq.quantization import pipeline, storage
from mgvq.quantization.codebooks import CodebookCache, rate_table
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


def cost(error, hessian):
    return float(((error @ hessian) * error).sum())


def damped(hessian, share=DAMPING):
    return hessian + share * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


# The textbook versions.


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


def by_size(power):
    return power.argsort(descending=True).tolist()


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


def pairs(num_in):
    return [(c, c + 1) for c in range(0, num_in, 2)]


def table_of(codebook):
    codebook = getattr(codebook, "transposed", codebook)
    return centroids(codebook.table, codebook.step).double()


def same_codes(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


SEEDS = pytest.mark.parametrize("seed", [0, 100, 200])


@SEEDS
def test_rtn(seed):
    item = layer(seed)
    same_codes(one(preset("method=rtn"), item), nearest_on_grid(item.weight, grid_scales(item.weight, 4)))


@SEEDS
def test_gptq(seed):
    item = layer(seed)
    hessian = item.moment()
    scales = grid_scales(item.weight, 4, hessian.diagonal())
    expected = gptq_loop(item.weight, hessian, by_size(hessian.diagonal()), lambda column: nearest_level(column, scales))
    same_codes(one(preset("method=gptq"), item), expected)


def awq_search(layers, x, token_weights):
    """20 exponents; the outputs of all layers that read x, token by token."""
    power = (token_weights[:, None] * x.square()).sum(0) / token_weights.sum()
    best = None
    for exponent in (i / 20 for i in range(20)):
        wanted = power.sqrt() ** exponent
        steps = (2 * (wanted.max() / wanted).log2()).round().clamp(max=7)
        stretch = 2 ** ((steps.max() - steps) / 2)
        tried, loss = [], 0.0
        for item in layers:
            wide = (item.weight * stretch.float()).float()
            value = nearest_on_grid(wide, grid_scales(wide, 2)) / stretch
            for token, weight in zip(x, token_weights, strict=True):
                loss += float(weight * ((value - item.weight.double()) @ token).square().sum())
            tried.append(value)
        if best is None or loss < best[0] * (1 - 1e-9):
            best = loss, tried, exponent
    return best


@SEEDS
def test_awq_two_layers_share_an_exponent(seed):
    first = loud(layer(seed))
    second = replace(first, weight=normal(5, NUM_IN, seed=seed + 9), g=first.g[..., :5])
    _, expected, exponent = awq_search([first, second], first.all_x, torch.ones(SAMPLES * TOKENS, dtype=torch.float64))
    found, _ = quantized(preset("method=awq"), first, second)
    assert exponent > 0
    for value, textbook in zip(found, expected, strict=True):
        same_codes(value, textbook)


@SEEDS
def test_mbq(seed):
    """Its loss is r |dy| of an image token, of which the square has r^2."""
    item = quiet_images(loud(layer(seed)))
    half = TOKENS // 2
    ratio = item.g[:, :half].abs().mean() / item.g[:, half:].abs().mean()  # one layer: its own median
    weights = torch.cat([ratio.square().expand(SAMPLES, half), torch.ones(SAMPLES, half)], 1).double().flatten()
    same_codes(one(preset("method=mbq"), item), awq_search([item], item.all_x, weights)[1][0])


@SEEDS
def test_gptvq(seed):
    item = layer(seed)
    (found,), (codebook,) = quantized(preset("method=gptvq", "sensitivity=uniform", "compensation.tables=weights"), item)
    table, hessian = table_of(codebook)[0], damped(item.moment())
    same_codes(found, torch.stack([best_continuation(row, hessian, table, pairs(NUM_IN)) for row in item.weight]))


@SEEDS
def test_vptq(seed):
    """Runs of two rows, each to the nearest centroid: GPTQ's loop, column by column."""
    item, hessian = layer(seed, num_out=24), layer(seed, num_out=24).moment()
    (found,), (codebook,) = quantized(preset("method=vptq", *ONE_TABLE), item)
    table = table_of(codebook)[0]

    def choose(column):
        return torch.cat([table[(table - run).square().sum(1).argmin()] for run in column.view(-1, 2)])

    same_codes(found, gptq_loop(item.weight, hessian, by_size(hessian.diagonal()), choose))


ONE_TABLE = ("codebook.vector_length=2", "codebook.residual=false")


@SEEDS
def test_vptq_residual_stage(seed):
    """A run of four rows is a centroid of the first table and one of the second, the nearest to what the first leaves."""
    item, hessian = layer(seed, num_out=24), layer(seed, num_out=24).moment()
    method = preset("method=vptq", "codebook.vector_length=4")
    (found,), (codebook,) = quantized(method, item, rate="4x16+16")
    first, second = table_of(codebook)

    def nearest(table, run):
        return table[(table - run).square().sum(1).argmin()]

    def choose(column):
        heads = [nearest(first, run) for run in column.view(-1, 4)]
        return torch.cat([head + nearest(second, run - head) for head, run in zip(heads, column.view(-1, 4), strict=True)])

    same_codes(found, gptq_loop(item.weight, hessian, by_size(hessian.diagonal()), choose))


def test_vptq_centroids_are_means_by_the_diagonal():
    """At the end of Lloyd's iterations every centroid is the mean of its runs, each with H_qq."""
    item = layer(num_out=64)
    _, (codebook,) = quantized(preset("method=vptq", *ONE_TABLE, "codebook.table=fp16", "codebook.iterations=200"), item)
    table, power = table_of(codebook)[0], item.moment().diagonal()
    mass, total = torch.zeros(16, 1, dtype=torch.float64), torch.zeros(16, 2, dtype=torch.float64)
    for c, r in itertools.product(range(NUM_IN), range(0, 64, 2)):
        run = item.weight[r : r + 2, c].double()
        code = int((table - run).square().sum(1).argmin())
        mass[code] += power[c]
        total[code] += power[c] * run
    torch.testing.assert_close(table, total / mass, rtol=0, atol=2e-3)


@SEEDS
def test_rsavq(seed):
    item = layer(seed, num_out=64, num_in=16)
    method = preset("method=rsavq")
    (found,), codebooks = quantized(method, item)
    gradients = [g.T @ x for g, x in zip(item.g.double(), item.x.double(), strict=True)]
    h_out, h_in = (damped(sum(parts), 0.01) for parts in ([G @ G.T for G in gradients], [G.T @ G for G in gradients]))
    natural = torch.linalg.solve(torch.kron(h_out, h_in), sum(gradients).flatten()).view(64, 16)
    target = item.weight.double() - 0.05 * item.weight.double().norm() * natural / natural.norm()
    scores = next(iter(method.sensitivity({SITE: item.weight}, {SITE: item.stats(method)}).values()))
    expected = torch.empty_like(target)
    for group, codebook in enumerate(codebooks):
        columns = sorted(scores.argsort()[4 * group : 4 * group + 4].tolist())
        for turn, table in enumerate(table_of(codebook)):  # two vectors of a row in the group: one table each
            own = columns[2 * turn : 2 * turn + 2]
            for row in range(64):
                expected[row, own] = table[(table - target[row, own]).square().sum(1).argmin()]
    same_codes(found, expected)


SITE = Site("q", "language", "q", 0, 64, 16, reads="qkv")


def rowwise(method, item, hessian_of_row):
    """A method with the codes of `best_continuation`, every row in its own Hessian."""
    (found,), (codebook,) = quantized(method, item)
    table = table_of(codebook)[0]
    rows = [best_continuation(row, damped(hessian_of_row(r)), table, pairs(NUM_IN)) for r, row in enumerate(item.weight)]
    return found, torch.stack(rows)


def weighted_moment(x, weights):
    return sum(w * torch.outer(t, t) for w, t in zip(weights, x, strict=True))


@SEEDS
def test_guidedquant(seed):
    """Eight rows in four groups: the squared gradients of two rows weigh the tokens of both."""
    item = layer(seed)

    def hessian(row):
        group = slice(row // 2 * 2, row // 2 * 2 + 2)
        return weighted_moment(item.all_x, item.all_g[:, group].square().mean(1))

    same_codes(*rowwise(preset("method=guidedquant", *LDLQ_ALONE), item, hessian))


LDLQ_ALONE = (
    "sensitivity=uniform",
    "transform=none",
    "compensation=hessian",
    "compensation.damping=0.01",
    "codebook.vector_length=2",
)


@SEEDS
def test_vlmq(seed):
    item = layer(seed)
    hessian = weighted_moment(item.all_x, item.all_g.square().sum(1))
    scales = grid_scales(item.weight, 4, hessian.diagonal())
    order = by_size(item.moment().diagonal())
    same_codes(one(preset("method=vlmq"), item), gptq_loop(item.weight, hessian, order, lambda c: nearest_level(c, scales)))


@SEEDS
def test_foem(seed):
    """Every column at its weight and nine tenths of what would make up best for the errors made so far."""
    item = layer(seed)
    scales, hessian = grid_scales(item.weight, 4, item.moment().diagonal()), damped(item.moment())
    order, value = by_size(item.moment().diagonal()), item.weight.double().clone()
    for q, column in enumerate(order):
        fixed, free = order[:q], order[q:]
        error = item.weight.double()[:, fixed] - value[:, fixed]
        best = error @ hessian[fixed][:, free] @ torch.linalg.inv(hessian[free][:, free])
        value[:, column] = nearest_level(item.weight[:, column] + 0.9 * best[:, 0], scales)
    same_codes(one(preset("method=foem"), item), value)


@SEEDS
def test_yaqa(seed):
    """Method 2.5: W^ = Q(W + L_O'^T D L_I' + L_O'^T D + D L_I'), tiles of one row and two columns from the last corner."""
    item = layer(seed)
    (found,), (codebook,) = quantized(preset("method=yaqa", *SMALL_TILES), item)
    table = table_of(codebook)[0]
    gradients = [g.T @ x for g, x in zip(item.g.double(), item.x.double(), strict=True)]
    h_out, h_in = (damped(sum(parts)) for parts in ([G @ G.T for G in gradients], [G.T @ G for G in gradients]))
    rows = h_out.diagonal().argsort(descending=True).flip(0)  # the one of most curvature is rounded first, hence last
    columns = torch.arange(NUM_IN).view(-1, 2).flip(0).flatten()
    weight = item.weight.double()[rows][:, columns]
    lower_out = unit_lower(h_out[rows][:, rows], 1)[0]
    lower_in, blocks = unit_lower(h_in[columns][:, columns], 2)
    strict_out, strict_in = (lower - torch.eye(len(lower), dtype=torch.float64) for lower in (lower_out, lower_in))
    delta, value = torch.zeros_like(weight), torch.zeros_like(weight)
    for j in reversed(range(NUM_IN // 2)):
        tile = slice(2 * j, 2 * j + 2)
        for r in reversed(range(NUM_OUT)):
            feedback = strict_out.T @ delta @ strict_in + strict_out.T @ delta + delta @ strict_in
            error = weight[r, tile] + feedback[r, tile] - table
            value[r, tile] = table[((error @ blocks[j]) * error).sum(1).argmin()]
            delta[r, tile] = weight[r, tile] - value[r, tile]
    expected = torch.empty_like(value)
    expected[rows[:, None], columns] = value
    same_codes(found, expected)


SMALL_TILES = (
    "sensitivity=uniform",
    "transform=none",
    "codebook=kmeans",
    "codebook.table=int8",
    *(f"compensation.{d}={DAMPING}" for d in ("damping", "output_damping")),
)


@SEEDS
def test_yaqa_with_its_code(seed):
    """The same with tiles of 16 x 16 trellis codes, rotated on both sides; rows that fill up the last tile are zero."""
    item, method = (
        layer(seed, num_out=40, num_in=32),
        preset("method=yaqa", "sensitivity=uniform", "codebook.state_bits=8", "codebook.values=computed"),
    )
    (found,), (codebook,) = quantized(method, item)
    turned, turn = rotated(method, item)
    gradients = [g.T @ x for g, x in zip(turned.g.double(), turned.x.double(), strict=True)]
    h_out, h_in = (damped(sum(parts), 0.1) for parts in ([G @ G.T for G in gradients], [G.T @ G for G in gradients]))
    h_out = torch.block_diag(h_out, torch.eye(8, dtype=torch.float64))
    columns = torch.arange(32).view(-1, 16).flip(0).flatten()
    weight = torch.nn.functional.pad(turned.weight.double(), (0, 0, 0, 8))[:, columns]
    lower_out, lower_in = unit_lower(h_out, 16)[0], unit_lower(h_in[columns][:, columns], 16)[0]
    strict_out, strict_in = (lower - torch.eye(len(lower), dtype=torch.float64) for lower in (lower_out, lower_in))
    delta, value = torch.zeros_like(weight), torch.zeros_like(weight)
    for j in (1, 0):
        for r in (2, 1, 0):
            rows, across = slice(16 * r, 16 * r + 16), slice(16 * j, 16 * j + 16)
            feedback = strict_out.T @ delta @ strict_in + strict_out.T @ delta + delta @ strict_in
            aim = (weight + feedback)[rows, across].float()
            value[rows, across] = codebook.encode(aim[:, None], 0, None)[1][:, 0].double()
            delta[rows, across] = weight[rows, across] - value[rows, across]
    expected = torch.empty_like(value)
    expected[:, columns] = value
    same_codes(found, turn.weight_back(expected[:40].float()).double())


def rotated(method, item):
    """The layer as its rotation makes it, token by token, and the rotation."""
    site = Site("q", "language", "q", 0, *item.weight.shape, reads="qkv")
    turn = method.transform([site], None)[site]
    eyes = [torch.eye(n, dtype=torch.float64) for n in item.weight.shape]
    u, v_transposed = rotate_matrix(eyes[0], turn.outputs, None), rotate_matrix(eyes[1], None, turn.inputs)
    return Layer(turn.weight(item.weight), item.x.double() @ v_transposed, item.g.double() @ u.T), turn


def block_ldlq(weight, hessian, length, choose):
    """QuIP#, section 4.1, from the first vector to the last: each at its weights and what is fed back of those before it."""
    columns = torch.arange(len(hessian)).view(-1, length).flip(0).flatten()
    weight, lower = weight.double()[:, columns], unit_lower(hessian[columns][:, columns], length)[0]
    value = torch.zeros_like(weight)
    for j in reversed(range(len(columns) // length)):
        own = slice(j * length, (j + 1) * length)
        later = slice((j + 1) * length, None)
        value[:, own] = choose(weight[:, own] + (weight - value)[:, later] @ lower[later, own])
    expected = torch.empty_like(value)
    expected[:, columns] = value
    return expected


@SEEDS
def test_quip_sharp(seed):
    """Eight weights at a time, the nearest of all 65,536 points in plain distance, at the scale that serves a Gaussian best."""
    item, method = layer(seed, num_out=16, num_in=32), preset("method=quip_sharp")
    turned, turn = rotated(method, item)
    scale = float((turned.weight.double().square().mean().sqrt() * measured("lattice", 2.0).scales[0]).half())
    points = e8p_points(torch.arange(2**16)).double() * scale

    def choose(aims):
        return points[(points.square().sum(1) - 2 * aims @ points.T).argmin(1)]

    expected = block_ldlq(turned.weight, damped(turned.moment()), 8, choose)
    same_codes(one(method, item), turn.weight_back(expected.float()).double())


@SEEDS
def test_qtip(seed):
    """Blocks of 16 columns; 16 rows of one are a sequence of 256 weights, which the trellis search codes (test_trellis.py)."""
    item, method = layer(seed, num_out=32, num_in=32), preset("method=qtip", "codebook.state_bits=8")
    turned, turn = rotated(method, item)
    (found,), (codebook,) = quantized(method, item)

    def choose(aims):
        return codebook.encode(aims[:, None].float(), 0, None)[1][:, 0].double()

    expected = block_ldlq(turned.weight, damped(turned.moment()), 16, choose)
    same_codes(found, turn.weight_back(expected.float()).double())


def descend(row, value, hessian, entries, vectors, sweeps):
    """Vector by vector, the entry with which the whole quadratic of the row costs least, all others as they are."""
    for _ in range(sweeps):
        for vector in vectors:
            tries = value.repeat(len(entries), 1)
            tries[:, list(vector)] = entries
            errors = row.double() - tries
            value = tries[((errors @ hessian) * errors).sum(1).argmin()]
    return value


@SEEDS
def test_aqlm(seed):
    """Sums of two centroids, one of each table: with a beam as wide as all of them, the best of 256 for each vector."""
    item = layer(seed)
    method = preset(
        "method=aqlm", "sensitivity=uniform", *(f"codebook.{s}" for s in ("vector_length=4", "beam=256")), "compensation.sweeps=3"
    )
    (found,), (codebook,) = quantized(method, item)
    first, second = table_of(codebook)
    sums, vectors = (first[:, None] + second).flatten(0, 1), [range(c, c + 4) for c in range(0, NUM_IN, 4)]
    hessian = damped(item.moment())
    begun = [best_continuation(row, hessian, sums, vectors) for row in item.weight]
    rows = zip(item.weight, begun, strict=True)
    same_codes(found, torch.stack([descend(row, value, hessian, sums, vectors, 3) for row, value in rows]))


@SEEDS
def test_guidedquant_codes_by_coordinate_descent(seed):
    """LNQ's second step, for vectors: each group of rows in its own Hessian, of inputs that are rotated."""
    item, method = (
        layer(seed),
        preset("method=guidedquant", "sensitivity=uniform", "codebook.vector_length=2", "compensation.sweeps=4"),
    )
    turned, turn = rotated(method, item)
    (found,), (codebook,) = quantized(method, item)
    table, expected = table_of(codebook)[0], []
    for r, row in enumerate(turned.weight):
        group = slice(r // 2 * 2, r // 2 * 2 + 2)
        hessian = damped(weighted_moment(turned.all_x, turned.all_g[:, group].square().mean(1)))
        begun = best_continuation(row, hessian, table, pairs(NUM_IN))
        expected.append(descend(row, begun, hessian, table, pairs(NUM_IN), 4))
    same_codes(found, turn.weight_back(torch.stack(expected).float()).double())


def test_lnq_tables_are_the_least_squares_solution():
    """LNQ's first step, c = (P^T H P)^-1 P^T H w, by the normal equations of all rows; the refit is that of the metric itself."""
    item = layer(num_out=64)
    method = preset("method=guidedquant", *LDLQ_ALONE, "codebook.table=fp16", "refit.damping=0.0", "refit.rounds=1")
    site = Site("q", "language", "q", 0, *item.weight.shape, reads="qkv")
    problems = pipeline.layer_problems({site: item.weight}, {site: item.stats(method)}, method)
    cache = CodebookCache(cut_table_groups(problems, method.codebook), method.codebook, problems)
    rate = next(r for r in method.codebook.rates() if r.index_bits == 2)
    rounder = LayerRounder(cache, [rate], method.compensation, method.refit, {})
    stored = rounder.round([site], []).stored[site]
    codes, left, right = (
        stored.codes[:, :, 0].long(),
        torch.zeros(32, 32, dtype=torch.float64),
        torch.zeros(32, dtype=torch.float64),
    )
    for rows, h in problems[site].metric.row_runs(64):
        for r in range(rows.start, rows.stop):
            place = torch.zeros(NUM_IN, 32, dtype=torch.float64)  # which entry of the table each weight of the row is
            for c in range(NUM_IN):
                place[c, 2 * int(codes[r, c // 2]) + c % 2] = 1
            left += place.T @ h.double() @ place
            right += place.T @ h.double() @ item.weight[r].double()
    solution = torch.linalg.lstsq(left, right).solution.view(16, 2)
    torch.testing.assert_close(table_of(stored)[0], solution, rtol=0, atol=2e-3)


@SEEDS
def test_gptvq_fits_its_tables_to_corrected_weights(seed):
    """The table is that of k-means on the weights as a first pass has corrected them; the codes are those of the textbook."""
    item, method = layer(seed, num_out=16), preset("method=gptvq", "sensitivity=uniform", "codebook.vector_length=2")
    site = Site("q", "language", "q", 0, *item.weight.shape, reads="qkv")
    problems = pipeline.layer_problems({site: item.weight}, {site: item.stats(method)}, method)
    (table_group,) = cut_table_groups(problems, method.codebook)
    rate = next(r for r in method.codebook.rates() if r.index_bits == 2)

    def table(weight):
        importance = problems[site].metric.channel_importance()
        return table_of(method.codebook.fit(table_group.info.name, [weight], rate, [importance], [])[0])[0]

    hessian, met = damped(item.moment()), []
    for row in item.weight:
        value = best_continuation(row, hessian, table(item.weight), pairs(NUM_IN))
        aims, error = row.double().clone(), row.double() - value
        for c in range(0, NUM_IN, 2):
            done, free = list(range(c)), list(range(c, NUM_IN))
            if done:
                aims[c : c + 2] += (error[done] @ hessian[done][:, free] @ torch.linalg.inv(hessian[free][:, free]))[:2]
        met.append(aims)
    again = table(torch.stack(met).float())
    (found,), _ = quantized(method, item)
    same_codes(found, torch.stack([best_continuation(row, hessian, again, pairs(NUM_IN)) for row in item.weight]))


def unit_lower(hessian, length):
    """`H = L D L^T`, L unit block lower triangular: block by block, by elimination."""
    rest, lower, blocks = hessian.clone(), torch.eye(len(hessian), dtype=torch.float64), []
    for at in range(0, len(hessian), length):
        own = slice(at, at + length)
        blocks.append(rest[own, own].clone())
        lower[at:, own] = rest[at:, own] @ torch.linalg.inv(blocks[-1])
        rest = rest - lower[:, own] @ blocks[-1] @ lower[:, own].T * (torch.arange(len(hessian)) >= at)[:, None]
    return lower, blocks


# What the papers report.


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


def total(objective, *methods, make=layer, seeds=range(0, 800, 100)):
    """Summed over layers: the objective of each method's error."""
    items = [make(seed, num_out=32) for seed in seeds]
    return [sum(objective(one(m, i) - i.weight.double(), i) for i in items) for m in methods]


def output_error(error, item):
    return cost(error, item.moment())


def text_error(error, item):
    text = item.x[:, TOKENS // 2 :].double().flatten(0, 1)
    return cost(error, text.T @ text / len(text)) / cost(item.weight.double(), text.T @ text / len(text))


def guided_error(error, item):
    runs = zip(error.chunk(4), item.all_g.square().chunk(4, 1), strict=True)
    return sum(cost(rows, weighted_moment(item.all_x, g.mean(1))) for rows, g in runs)


def kronecker_error(error, item):
    gradients = [g.T @ x for g, x in zip(item.g.double(), item.x.double(), strict=True)]
    h_out, h_in = sum(G @ G.T for G in gradients), sum(G.T @ G for G in gradients)
    return float((h_out @ error @ h_in * error).sum())


def test_gptq_beats_rtn_and_foem_lies_between():
    """On one grid for all three."""
    plain = [preset(f"method={m}", "codebook.weighted=false") for m in ("rtn", "foem", "gptq")]
    rtn, foem, gptq = total(output_error, *plain)
    assert gptq < 0.8 * rtn
    assert gptq < foem < rtn


def test_awq_beats_rtn_where_few_channels_are_loud():
    rtn, awq = total(output_error, preset("method=rtn"), preset("method=awq"), make=lambda *a, **k: loud(layer(*a, **k)))
    assert awq < 0.8 * rtn


def test_mbq_serves_the_text_that_awq_gives_up_for_images():
    awq, mbq = total(text_error, preset("method=awq"), preset("method=mbq"), make=lambda *a, **k: quiet_images(layer(*a, **k)))
    assert mbq < 0.95 * awq


def test_vlmq_serves_the_text_that_gptq_gives_up_for_images():
    gptq, vlmq = total(
        text_error, preset("method=gptq"), preset("method=vlmq"), make=lambda *a, **k: quiet_images(layer(*a, **k))
    )
    assert vlmq < 0.95 * gptq


def test_second_order_beats_nearest_with_both_directions_of_vectors():
    for method in ("gptvq", "vptq"):
        with_feedback, nearest = total(output_error, preset(f"method={method}"), preset(f"method={method}", *NEAREST[method]))
        assert with_feedback < 0.9 * nearest


NEAREST = {
    "gptvq": ["compensation=none", "~compensation.damping", "~compensation.tables", "sensitivity=uniform"],
    "vptq": ["compensation=none", "~compensation.damping", "sensitivity=uniform"],
}


def test_guidedquant_lowers_the_guided_objective_of_ldlq():
    ldlq, guided = total(
        guided_error,
        preset("method=guidedquant", *LDLQ_ALONE, "curvature=input"),
        preset("method=guidedquant", *LDLQ_ALONE),
        make=uneven_gradients,
    )
    assert guided < 0.95 * ldlq


def uneven_gradients(seed, num_out):
    """Every fourth of the rows hears other tokens."""
    item = layer(seed, num_out=num_out)
    ear = (normal(4, SAMPLES, TOKENS, seed=seed + 5) * 1.5).exp().repeat_interleave(num_out // 4, 0).permute(1, 2, 0)
    return replace(item, g=item.g * ear)


def test_yaqa_lowers_the_kronecker_objective_of_ldlq():
    ldlq, yaqa = total(
        kronecker_error,
        preset("method=yaqa", *SMALL_TILES[:4], "compensation=hessian", "~compensation.output_damping"),
        preset("method=yaqa", *SMALL_TILES),
    )
    assert yaqa < 0.9 * ldlq


def test_rsavq_mixed_bits_lose_less_than_uniform_ones_at_equal_bytes():
    """Channel energies over a factor of 1000: predicted loss of the allocation, on tables that are fitted."""
    method, generator = preset("method=rsavq"), torch.Generator().manual_seed(0)
    sites = [Site(f"l{i}", "language", "up_proj", i, 128, 64) for i in range(6)]
    weights = {s: torch.randn(128, 64, generator=generator) for s in sites}
    scores = {s: (2.5 * torch.randn(64, generator=generator)).exp() for s in sites}
    problems = layer_problems(sites, weights=weights, scores=scores, groups=method.grouping(scores, {}))
    table_groups = cut_table_groups(problems, method.codebook)
    table = rate_table(CodebookCache(table_groups, replace(method.codebook, iterations=4, sample=32), problems), "measured")
    budget, index = int(2.6 * 6 * 128 * 64), torch.arange(len(table_groups))
    mixed, uniform = (rule(table, budget) for rule in (method.allocation, Uniform(tolerance=0.0, spread=True)))
    assert table.bits[index, mixed].sum() <= budget
    assert table.loss[index, mixed].sum() < 0.8 * table.loss[index, uniform].sum()
