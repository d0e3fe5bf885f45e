"""Grids and column vectors: what a fit chooses, what it refuses, what it says."""

import pytest
import torch

from mgvq.codebook.columns import Columns
from mgvq.codebook.grid import Grid
from mgvq.codebook.scaled_grid import ScaledGrid
from mgvq.errors import UserError
from mgvq.types import ChannelSlice, Metric, Site

VECTORS = dict(vector_length=2, share="layer", table="fp16", weight_power=0.0, iterations=3, sample=None, seed=0)
AWQ = ScaledGrid(group_size=None, scale_bits=2, num_exponents=4)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fit(codebook, weight, bits=2.0, importance=None, flags=None):
    rate = next(r for r in codebook.rates() if r.index_bits == bits)
    return codebook.fit("group", [weight], rate, [importance], [] if flags is None else flags)[0]


def rounded(fitted, weight):
    return fitted.encode(weight[:, :, None], 0, None)[1][:, :, 0]


def test_one_bit_is_the_sign_times_the_mean_magnitude() -> None:
    """The best scale of +-s/2 is twice the mean magnitude; scales are tried in steps of 2^(1/4)."""
    weight = normal(1, 4000)
    values = rounded(fit(Grid(group_size=None, scale_bits=4), weight, 1.0), weight)
    assert torch.equal(values.sign(), weight.sign())
    assert float(values.abs()[0, 0]) == pytest.approx(float(weight.abs().mean()), rel=0.1)


def test_two_bits_of_a_gaussian_lose_what_the_best_uniform_quantiser_loses() -> None:
    """.1188 of the variance (Max 1960, Table II)."""
    weight = normal(4, 20000)
    error = (rounded(fit(Grid(group_size=None, scale_bits=4), weight), weight) - weight).square().mean()
    assert float(error) == pytest.approx(0.1188, rel=0.03)


def test_rows_of_other_sizes_have_scales_of_their_own_up_to_a_factor_of_sixteen() -> None:
    row = normal(1, 256)
    weight = torch.cat([row, 3 * row, 8 * row, torch.zeros(1, 256)])
    values = rounded(fit(Grid(group_size=None, scale_bits=8), weight), weight)
    errors = (values - weight).square().sum(1)[:3] / weight.square().sum(1)[:3]
    torch.testing.assert_close(errors, errors[:1].expand(3), rtol=0.02, atol=0)
    assert values[3].abs().max() <= values[0].abs().max()


def test_padding_of_the_last_group_does_not_count() -> None:
    weight = normal(3, 10)
    grouped, last = fit(Grid(group_size=8, scale_bits=8), weight), fit(Grid(group_size=8, scale_bits=8), weight[:, 8:])
    short = (rounded(grouped, weight)[:, 8:] - weight[:, 8:]).square().sum()
    assert short <= (rounded(last, weight[:, 8:]) - weight[:, 8:]).square().sum() * 1.05


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e6])
def test_a_weight_that_fp16_scales_do_not_reach_is_refused(value) -> None:
    weight = normal(3, 10)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="finite and below"):
        fit(Grid(group_size=None, scale_bits=4), weight)


def test_awq_without_loud_channels_is_never_worse_than_its_grid() -> None:
    plain = Grid(group_size=None, scale_bits=2)
    for seed in range(5):
        weight, x = normal(8, 12, seed=seed), normal(64, 12, seed=seed + 10)
        gram = x.T @ x
        errors = [rounded(f, weight) - weight for f in (fit(AWQ, weight, importance=gram), fit(plain, weight))]
        awq, grid = (float((e @ gram * e).sum()) for e in errors)
        assert awq <= grid * (1 + 1e-6)


def test_awq_stretches_by_activation_and_stores_that_once() -> None:
    site = Site("q", "language", "q", 0, 4, 6, reads="qkv")
    slices = [ChannelSlice(s, 0, torch.arange(6)) for s in (site, Site("k", "language", "k", 0, 2, 6, reads="qkv"))]
    gram = torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 1000]))
    rate = AWQ.rates()[1]
    fitted = AWQ.fit(AWQ.table_group(slices[0]), [normal(*p.shape) for p in slices], rate, [gram, gram], [])
    stored = [f.weight(f.encode(normal(*p.shape)[:, :, None], 0, None)[0]) for f, p in zip(fitted, slices, strict=True)]
    assert stored[0].channels is stored[1].channels
    tensors = [t for s in stored for t in s.tensors().values()]
    assert AWQ.storage_bits(slices, rate) == 8 * sum({id(t): t.nbytes for t in tensors}.values())


def test_awq_says_that_it_has_no_activations() -> None:
    weight, flags = normal(4, 6), []
    values = rounded(fit(AWQ, weight, importance=torch.zeros(6, 6), flags=flags), weight)
    torch.testing.assert_close(values, rounded(fit(Grid(group_size=None, scale_bits=2), weight), weight))
    assert flags == ["no_activation:group"]
    with pytest.raises(UserError, match="choose a curvature"):
        fit(AWQ, weight)


def test_rows_with_a_metric_of_their_own_must_not_cut_a_vector() -> None:
    fitted = fit(Columns(**VECTORS), normal(8, 6))
    assert fitted.rows(slice(2, 8)).encode(normal(6, 1)[:, :, None], 0, None)[0].shape == (3, 1, 1)
    with pytest.raises(UserError, match=r"codebook\.vector_length=2"):
        fitted.rows(slice(3, 8))


def test_the_mean_gram_has_the_channel_energies_on_its_diagonal() -> None:
    metric = Metric(tuple(normal(3, 5, 5).square()))
    assert torch.equal(metric.mean_gram().diagonal(), metric.channel_importance())


@pytest.mark.parametrize(
    ("variant", "settings", "named"),
    [
        (Grid, dict(group_size=0, scale_bits=4), "group_size"),
        (Grid, dict(group_size=None, scale_bits=0), "scale_bits"),
        (Grid, dict(group_size=None, scale_bits=9), "scale_bits"),
        (ScaledGrid, dict(group_size=None, scale_bits=2, num_exponents=1), "num_exponents"),
    ],
)
def test_a_bad_setting_is_named(variant, settings, named) -> None:
    with pytest.raises(UserError, match=rf"codebook\.{named} must be"):
        variant(**settings)
