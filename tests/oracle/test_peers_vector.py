"""Peers with tables of vectors, each as its preset makes it from tokens to codes, against a slow textbook version.

The formulas of VPTQ, GPTVQ and RSAVQ were read where docs/method.md says; LNQ's two steps (GuidedQuant, arXiv 2505.07004,
algorithm 2) in a summary of that algorithm. AQLM's text could not be read: what is tested is its objective with a search that is
exact for every vector.
"""

import itertools

import torch
from textbook import (
    LDLQ_ALONE,
    NUM_IN,
    SEEDS,
    best_continuation,
    by_size,
    damped,
    gptq_loop,
    layer,
    pairs,
    preset,
    quantized,
    rotated,
    same_codes,
    table_of,
    weighted_moment,
)

from mgvq.quantization import pipeline
from mgvq.quantization.codebooks import CodebookCache
from mgvq.quantization.rounding import LayerRounder
from mgvq.quantization.table_groups import cut_table_groups
from mgvq.types import Site

SITE = Site("q", "language", "q", 0, 64, 16, reads="qkv")
ONE_TABLE = ("codebook.vector_length=2", "codebook.residual=false")


@SEEDS
def test_gptvq(seed):
    item = layer(seed)
    (found,), (codebook,) = quantized(preset("method=gptvq", "sensitivity=uniform", "compensation.tables=weights"), item)
    table, hessian = table_of(codebook)[0], damped(item.moment())
    same_codes(found, torch.stack([best_continuation(row, hessian, table, pairs(NUM_IN)) for row in item.weight]))


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


@SEEDS
def test_vptq(seed):
    """Runs of two rows, each to the nearest centroid: GPTQ's loop, column by column."""
    item, hessian = layer(seed, num_out=24), layer(seed, num_out=24).moment()
    (found,), (codebook,) = quantized(preset("method=vptq", *ONE_TABLE), item)
    table = table_of(codebook)[0]

    def choose(column):
        return torch.cat([table[(table - run).square().sum(1).argmin()] for run in column.view(-1, 2)])

    same_codes(found, gptq_loop(item.weight, hessian, by_size(hessian.diagonal()), choose))


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


def rowwise(method, item, hessian_of_row):
    """A method with the codes of `best_continuation`, every row in its own Hessian."""
    (found,), (codebook,) = quantized(method, item)
    table = table_of(codebook)[0]
    rows = [best_continuation(row, damped(hessian_of_row(r)), table, pairs(NUM_IN)) for r, row in enumerate(item.weight)]
    return found, torch.stack(rows)


@SEEDS
def test_guidedquant(seed):
    """Eight rows in four groups: the squared gradients of two rows weigh the tokens of both."""
    item = layer(seed)

    def hessian(row):
        group = slice(row // 2 * 2, row // 2 * 2 + 2)
        return weighted_moment(item.all_x, item.all_g[:, group].square().mean(1))

    same_codes(*rowwise(preset("method=guidedquant", *LDLQ_ALONE), item, hessian))


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
