"""The limit beside every layer's error: against the closed form, and against Gaussian layers that codes have coded."""

import math

import pytest
import torch
from conftest import layer_problems
from variants import built

from mgvq.compensation.hessian import Hessian
from mgvq.compensation.none import NoCompensation
from mgvq.quantization import limits as module
from mgvq.quantization.codebooks import CodebookCache, rate_table
from mgvq.quantization.limits import DAMPING, Limits
from mgvq.quantization.report import layers_table
from mgvq.quantization.rounding import LayerRounder
from mgvq.quantization.storage import bits_by_layer, held_bits
from mgvq.quantization.table_groups import cut_table_groups
from mgvq.rate_distortion import least_damage
from mgvq.types import Metric, Site

SITE = Site("layer.q_proj", "language", "q_proj", 0, 128, 256)
CODES = {
    "kmeans": ("kmeans", "vector_length=2", "iterations=20", "sample=null"),
    "trellis": ("trellis", "state_bits=8"),
    "lattice": ("lattice",),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factor(n, seed=0, power=1.0):
    """With eigenvalues that fall by four decades, in a random basis."""
    basis = torch.linalg.qr(normal(n, n, seed=seed).double())[0]
    return (basis * torch.logspace(0, -4 * power, n, dtype=torch.float64)) @ basis.T


def damped(h):
    return h + DAMPING * h.diagonal().mean() * torch.eye(len(h))


def rounded(codebook, bits, metric=None, compensation=None, site=SITE):
    """The row of the table of layers for one Gaussian layer."""
    problems = layer_problems([site], weights={site: normal(*site_shape(site), seed=7)}, metrics={site: metric})
    table_groups = cut_table_groups(problems, codebook)
    cache = CodebookCache(table_groups, codebook, problems)
    table = rate_table(cache, None)
    (chosen,) = [r for r, rate in enumerate(table.rates) if rate.index_bits == bits]
    limits = Limits(bits_by_layer({}, table_groups, table, [chosen]))
    rounder = LayerRounder(cache, [table.rates[chosen]], compensation or NoCompensation(), None, {}, limits)
    (row,) = layers_table(problems, rounder.round([site], [])).itertuples()
    return row


def site_shape(site):
    return site.out_features, site.in_features


def plain(metric, shape=(6, 8), bits=2.0, target=None):
    """The limit of a made-up layer of which nothing is known but its metric."""
    site = Site("a", "language", "a", 0, *shape)
    weight = normal(*shape) if target is None else target
    (problem,) = layer_problems([site], weights={site: weight}, metrics={site: metric}).values()
    return Limits({site: bits})(problem, 0.9 * weight), weight


@pytest.mark.parametrize(
    ("name", "bits"),
    [("kmeans", 1.0), ("kmeans", 2.0), ("kmeans", 3.0), ("lattice", 2.0), ("lattice", 3.0), ("lattice", 4.0)]
    + [("trellis", bits) for bits in (0.5, 1.0, 1.5, 2.0, 3.0)],
)
def test_a_gaussian_layer_lies_above_by_what_its_code_loses(name, bits):
    """Where all errors count alike: the code's distortion over 4^-bits, the bits with tables and scales."""
    codebook = built("codebook", *CODES[name])
    row = rounded(codebook, bits)
    assert row.bits == pytest.approx(bits, abs=0.07)
    assert row.limit == pytest.approx(4**-row.bits, rel=1e-6)
    assert row.times_limit == pytest.approx(row.relative_error * 4**row.bits, rel=1e-4)
    assert row.times_limit >= 1
    if name != "kmeans":  # whose `distortion` is a bound
        (rate,) = [rate for rate in codebook.rates() if rate.index_bits == bits]
        assert row.times_limit == pytest.approx(codebook.distortion(rate) * 4**row.bits, rel=0.03)


@pytest.mark.parametrize("bits", [2.0, 4.0])
def test_ldlq_loses_its_code_and_the_shape_of_the_metric(bits):
    """`tr(D) distortion` over `n det(H)^(1/n) 4^-bits`, D the block diagonal of the LDL factors."""
    h = factor(256, power=0.5).float()  # steeper ones feed back so much that the targets leave the range of the code
    codebook = built("codebook", "lattice")
    row = rounded(codebook, bits, Metric((h,)), Hessian(damping=DAMPING))
    root = torch.linalg.cholesky(damped(h.double()))
    blocks = [root[i : i + 8, i : i + 8] for i in range(0, 256, 8)]
    spread = sum(float((b @ b.T).trace()) for b in blocks)
    least = 256 * math.exp(2 * float(root.diagonal().log().mean()))
    (rate,) = [rate for rate in codebook.rates() if rate.index_bits == bits]
    assert 1.1 < spread / least < 3
    assert row.times_limit == pytest.approx(spread / least * codebook.distortion(rate) * 4**row.bits, rel=0.15)
    assert row.times_limit < rounded(codebook, bits, Metric((h,))).times_limit / 1.5, "without feedback"


@pytest.mark.parametrize("bits", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("output", [True, False])
def test_it_is_the_closed_form_of_the_damped_factors(bits, output):
    h_in, h_out = factor(8).float(), factor(6, seed=1).float()
    found, weight = plain(Metric((h_in,), h_out if output else None), bits=bits)
    outputs = torch.linalg.eigvalsh(damped(h_out).double()) if output else torch.ones(6)
    least = float(weight.square().mean()) * least_damage(torch.linalg.eigvalsh(damped(h_in).double()), outputs, bits)
    whole = 2 * Metric((damped(h_in),), damped(h_out) if output else None).loss(weight)
    assert found.limit == pytest.approx(least / whole, rel=1e-4)
    assert found.times == pytest.approx(0.01 * whole / least, rel=1e-3)


@pytest.mark.parametrize("rows", [6, 5])
@pytest.mark.parametrize("output", [True, False])
def test_runs_of_rows_share_their_bits(rows, output):
    """Every weight has the damage of its run; 5 rows are two runs of 3 and 2."""
    h_in, h_out = (factor(8).float(), 50 * factor(8, seed=1).float()), factor(rows, seed=2).float()
    metric = Metric(h_in, h_out if output else None)
    found, weight = plain(metric, (rows, 8), bits=1.0)
    products = []
    for part, h in metric.row_runs(rows):
        block = damped(h_out)[part, part] if output else torch.eye(part.stop - part.start)
        products.append(torch.linalg.eigvalsh(torch.kron(block.double(), damped(h).double())))
    least = float(weight.square().mean()) * least_damage(torch.cat(products), torch.ones(1), 1.0)
    whole = 2 * Metric(tuple(map(damped, h_in)), damped(h_out) if output else None).loss(weight)
    assert found.limit == pytest.approx(least / whole, rel=1e-3)


def test_a_rotation_leaves_it_as_it_is():
    h_in, h_out, weight = factor(8).float(), factor(6, seed=1).float(), normal(6, 8)
    u, v = (torch.linalg.qr(normal(n, n, seed=n))[0] for n in (6, 8))
    here, _ = plain(Metric((h_in,), h_out), target=weight)
    there, _ = plain(Metric((v @ h_in @ v.T,), u @ h_out @ u.T), target=u @ weight @ v.T)
    assert there.limit == pytest.approx(here.limit, rel=1e-3)
    assert there.times == pytest.approx(here.times, rel=1e-3)


def test_the_eigenvalues_of_equal_factors_are_computed_once(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "eigenvalues", lambda h: asked.append(len(h)) or torch.linalg.eigvalsh(h.double()))
    sites = [Site(name, "language", name, 0, 6, 8) for name in "qkv"]
    metrics = {s: Metric((factor(8).float(),), factor(6, seed=i).float()) for i, s in enumerate(sites)}
    problems = layer_problems(sites, weights={s: normal(6, 8, seed=i) for i, s in enumerate(sites)}, metrics=metrics)
    limits = Limits(dict.fromkeys(sites, 2.0))
    for _ in range(2):
        for problem in problems.values():
            limits(problem, 0.9 * problem.target)
    assert sorted(asked) == [6, 6, 6, 8]


def test_a_layer_that_nothing_reaches_has_no_multiple():
    found, _ = plain(Metric((torch.zeros(8, 8),)))
    assert found.limit == 0
    assert math.isnan(found.times)


def test_what_layers_share_is_split_by_their_weights():
    sites = [Site(name, "language", "q_proj", 0, out, 4) for name, out in (("a", 2), ("b", 6))]
    ids, signs = torch.zeros(3, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8)
    codebook = built("codebook", "kmeans", "vector_length=2", "share=kind")
    table_groups = cut_table_groups(layer_problems(sites), codebook)
    table = rate_table(CodebookCache(table_groups, codebook, layer_problems(sites)), None)
    (bits,) = [int(b) for b in table.bits[0, :1]]
    held = {sites[0]: [ids, signs], sites[1]: [ids]}
    assert held_bits(held) == 8 * (3 + 5)
    found = bits_by_layer(held, table_groups, table, [0])
    assert found[sites[0]] == pytest.approx((bits / 4 + 24 / 4 + 40) / 8)
    assert found[sites[1]] == pytest.approx((bits * 3 / 4 + 24 * 3 / 4) / 24)
