"""The limit of a Gaussian layer against closed forms, a plain bisection, and codes, which it has to lie below."""

import math
import time

import pytest
import torch

from mgvq.distortion import measured
from mgvq.rate_distortion import eigenvalues, least_damage
from mgvq.trellis.code import trellis_code
from mgvq.trellis.coding import decode, encode

RATES = [0.0, 0.01, 0.5, 1.0, 2.0, 3.7, 8.0]


def layer_limit(weight, h_in, bits, h_out=None):
    """The least `tr(h_out D h_in D^T)` of an error D, if the weights were Gaussian of the layer's mean square."""
    outputs = torch.ones(len(weight), dtype=torch.float64) if h_out is None else eigenvalues(h_out)
    return float(weight.double().square().mean()) * least_damage(eigenvalues(h_in), outputs, bits)


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def factor(n, decades=4.0, seed=0):
    """Positive definite, its eigenvalues over some decades."""
    basis = torch.linalg.qr(torch.randn(n, n, generator=stream(seed), dtype=torch.float64)).Q
    return basis * 10 ** torch.linspace(-decades, 0, n, dtype=torch.float64) @ basis.T


def bisection(damages, bits):
    """The water level of all products by halving, and what lies below it."""
    budget = bits * damages.numel()
    low, high = 0.0, float(damages.max())
    for _ in range(200):
        level = (low + high) / 2
        if level == 0 or float((damages / level).log2().clamp(min=0).sum()) / 2 > budget:
            low = level
        else:
            high = level
    return float(damages.clamp(max=high).sum())


@pytest.mark.parametrize("bits", RATES)
def test_a_white_metric_leaves_the_distortion_of_a_gaussian(bits):
    weight = 3 * torch.randn(6, 10, generator=stream())
    expected = 60 * float(weight.square().mean()) * 4.0**-bits
    assert layer_limit(weight, torch.eye(10), bits) == pytest.approx(expected, rel=1e-6)
    assert layer_limit(weight, 2 * torch.eye(10), bits, 5 * torch.eye(6)) == pytest.approx(10 * expected, rel=1e-6)


@pytest.mark.parametrize("bits", [8.0, 10.0])
def test_at_high_rates_it_is_the_determinant(bits):
    h_in, h_out, weight = factor(12), factor(7, seed=1), torch.randn(7, 12, generator=stream())
    variance = float(weight.double().square().mean())
    one_sided = 7 * 12 * math.exp(torch.logdet(h_in) / 12) * variance * 4.0**-bits
    assert layer_limit(weight, h_in, bits) == pytest.approx(one_sided, rel=1e-6)
    two_sided = one_sided * math.exp(torch.logdet(h_out) / 7)
    assert layer_limit(weight, h_in, bits, h_out) == pytest.approx(two_sided, rel=1e-6)


@pytest.mark.parametrize("bits", RATES)
@pytest.mark.parametrize("zeros", [0, 4])
def test_it_is_what_halving_finds(bits, zeros):
    inputs = torch.rand(30, generator=stream(), dtype=torch.float64) ** 8
    outputs = torch.rand(20, generator=stream(1), dtype=torch.float64) ** 4
    inputs[:zeros] = 0
    damages = inputs * outputs[:, None]
    assert least_damage(inputs, outputs, bits) == pytest.approx(bisection(damages, bits), rel=1e-9)
    assert least_damage(outputs, inputs, bits) == pytest.approx(bisection(damages, bits), rel=1e-9)


def test_without_bits_all_is_lost_and_without_damage_nothing():
    weight, h_in = torch.randn(5, 8, generator=stream(), dtype=torch.float64), factor(8)
    assert layer_limit(weight, h_in, 0.0) == pytest.approx(float(weight.square().mean() * 5 * torch.trace(h_in)), rel=1e-9)
    assert layer_limit(weight, torch.zeros(8, 8), 2.0) == 0
    assert layer_limit(torch.zeros(5, 8), h_in, 2.0) == 0


def test_it_falls_convexly():
    inputs, outputs = eigenvalues(factor(40)), eigenvalues(factor(30, seed=2))
    line = torch.tensor([least_damage(inputs, outputs, bits / 4) for bits in range(33)], dtype=torch.float64)
    assert (line.diff() < 0).all()
    assert (line.diff().diff() > 0).all()


@pytest.mark.parametrize("name", ["lloyd_max", "kmeans_2", "lattice", "trellis_hybrid_8", "trellis_hybrid_12"])
@pytest.mark.parametrize("bits", [2.0, 3.0])
def test_codes_of_a_gaussian_lie_above(name, bits):
    limit = least_damage(torch.ones(1), torch.ones(1), bits)
    assert limit < measured(name, bits).distortion < 2.5 * limit


def test_mixed_codes_of_a_layer_lie_above_and_nearer_than_one_rate_for_all():
    """A diagonal metric of two kinds of columns, 2 bits a weight, as 1 and 3 bits and as 2 and 2."""
    weight, importance = torch.randn(64, 256, generator=stream()), torch.ones(256)
    importance[:128] = 16.0
    limit = layer_limit(weight, torch.diag(importance), 2.0)

    def damage(heavy, light):
        total = 0.0
        for columns, rate in ((slice(0, 128), heavy), (slice(128, 256), light)):
            code, scale = trellis_code(rate, 8), measured("trellis_hybrid_8", rate).scales[0]
            x = weight[:, columns]
            error = decode(encode(x / scale, code), code, 128) * scale - x
            total += float((error.square() * importance[columns]).sum())
        return total

    assert limit < damage(3.0, 1.0) < damage(2.0, 2.0) < damage(1.0, 3.0)


def test_a_large_layer_is_exact_and_takes_no_time():
    """Milliseconds for 4 M products, from columns and rows alone; sorting all would take a hundred times longer."""
    inputs, outputs = torch.rand(4096, generator=stream()).double() ** 6, torch.rand(1024, generator=stream(1)).double() ** 3
    some = inputs[::8], outputs[::8]
    assert least_damage(*some, 2.0) == pytest.approx(bisection(some[0] * some[1][:, None], 2.0), rel=1e-9)
    start = time.process_time()
    least_damage(inputs, outputs, 2.0)
    assert time.process_time() - start < 0.2


@pytest.mark.parametrize(
    ("h_in", "message"),
    [(torch.diag(torch.tensor([1.0, -0.1])), "semidefinite"), (torch.full((2, 2), torch.nan), "finite")],
    ids=["negative", "nan"],
)
def test_factors_that_are_none_are_refused(h_in, message):
    with pytest.raises(ValueError, match=message):
        layer_limit(torch.ones(3, 2), h_in, 2.0)


def test_negative_bits_are_refused():
    with pytest.raises(ValueError, match=">= 0"):
        least_damage(torch.ones(2), torch.ones(2), -1.0)


def test_rounding_below_zero_is_zero():
    x = torch.randn(20, 3, generator=stream(), dtype=torch.float64)
    assert eigenvalues((x @ x.T).float()).min() == 0
