"""What is particular to one codebook: grids, weighting, shared tables, turns and stages, and settings that are refused."""

import pytest
import torch

from mgvq.codebook import vector as vector_module
from mgvq.codebook.kmeans import KMeans
from mgvq.codebook.lloyd import Clusters
from mgvq.codebook.product import Product
from mgvq.codebook.residual import Residual
from mgvq.codebook.scalar import Scalar
from mgvq.codebook.trellis import Trellis
from mgvq.errors import UserError
from mgvq.formats.vector import to_vectors
from mgvq.types import ChannelSlice, Site

FP16 = 2.0**-11  # relative rounding error of fp16 outside its subnormals
VECTORS = dict(vector_length=2, share="layer", table="fp16", weight_power=0.0, iterations=3, sample=None, seed=0)


def k_means(**settings):
    return KMeans(**(VECTORS | settings))


def product(**settings):
    return Product(**(VECTORS | dict(num_tables=2) | settings))


def residual(**settings):
    return Residual(**(VECTORS | dict(vector_length=4) | settings))


each_share = pytest.mark.parametrize("share", ["layer", "input", "kind"])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rate(codebook, name):
    return {r.name: r for r in codebook.rates()}[name]


def fit(codebook, weights, name, importance=None, table_group="unit", flags=None):
    importance = [None] * len(weights) if importance is None else importance
    return codebook.fit(table_group, weights, rate(codebook, name), importance, [] if flags is None else flags)


def rounded(codebook, weights, name, importance=None, table_group="unit", flags=None):
    """Plain rounding: the stored weights."""
    fitted = fit(codebook, weights, name, importance, table_group, flags)
    return [f.weight(f.encode(to_vectors(w, f.vector_length), 0, None)[0]) for f, w in zip(fitted, weights, strict=True)]


def grid(weight, bits, group_size, clip="min_max"):
    return rounded(Scalar(group_size=group_size, clip=clip), [weight], f"int{bits}")[0]


def error(weight, stored, importance=1.0):
    return (importance * (stored.decode() - weight) ** 2).sum().item()


def as_bytes(stored):
    return [(role, t.numpy().tobytes()) for s in stored for role, t in s.tensors().items()]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_size", [3, 16])
@pytest.mark.parametrize(("spread", "shift"), [(1.0, 0.0), (0.02, 0.01), (30.0, -50.0), (1.0, 5.0)])
def test_no_weight_is_off_by_more_than_half_a_step(bits, group_size, spread, shift):
    """The last step of a range may be cut by what rounding the scale to fp16 takes from `top` steps."""
    weight = spread * normal(8, 16) + shift
    quantized = grid(weight, bits, group_size)
    step = quantized.scales.double().repeat_interleave(group_size, 1)[:, :16]
    bound = step / 2 + (2**bits - 1) * FP16 * step + 1e-6 * weight.abs().max()
    assert ((quantized.decode().double() - weight).abs() <= bound).all()


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_the_grid_reaches_from_minimum_to_maximum(bits):
    """The bound above would hold for a step of any size; this one is the smallest that covers the range with 0."""
    weight = normal(8, 16)
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    step = grid(weight, bits, 16).scales[:, 0].float()
    assert torch.allclose(step * (2**bits - 1), high - low, rtol=2 * FP16)  # rounded up, not to nearest


@pytest.mark.parametrize("clip", ["min_max", "mse"])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shift", [-2.0, -0.3, 0.0, 0.4, 3.0])
def test_zero_is_exact(bits, shift, clip):
    weight = normal(6, 10) + shift
    weight[:, ::3] = 0
    assert (grid(weight, bits, 5, clip).decode()[:, ::3] == 0).all()


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("value", [-3.3, -0.01, 0.07, 1.0, 12.3])
def test_constant_rows_are_met_up_to_fp16(bits, value):
    weight = torch.full((2, 7), value)
    assert torch.allclose(grid(weight, bits, 3).decode(), weight, rtol=2 * FP16, atol=0)


@pytest.mark.parametrize("bits", [1, 8])
def test_all_zero_rows_stay_zero_beside_others(bits):
    weight = normal(3, 8)
    weight[1] = 0
    quantized = grid(weight, bits, 4)
    assert (quantized.decode()[1] == 0).all()
    assert (quantized.scales > 0).all()


@pytest.mark.parametrize("bits", [1, 8])
def test_codes_use_the_bits_and_no_more(bits):
    quantized = grid(normal(4, 600), bits, 600)
    for row in quantized.codes:
        assert int(row.max()) - int(row.min()) == 2**bits - 1
    assert 0 <= int(quantized.zeros.min()) <= int(quantized.zeros.max()) < 2**bits


@pytest.mark.parametrize("shift", [-5.0, 5.0])
def test_a_short_last_group_is_quantised_as_if_it_were_alone(shift):
    weight = normal(4, 8) + shift
    short = grid(weight, 3, 5).decode()[:, 5:]
    assert torch.equal(short, grid(weight[:, 5:], 3, 3).decode())


@pytest.mark.parametrize("size", [3e-7, 1e-6, 1e-5])
def test_tiny_weights_keep_the_bound_where_the_scale_is_subnormal(size):
    """A scale that is rounded down too far would cut off the largest weights."""
    weight = size * normal(32, 16)
    quantized = grid(weight, 8, 16)
    assert ((quantized.decode().double() - weight).abs() <= quantized.scales.double()).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_weights_that_no_grid_spans_are_refused(bad):
    with pytest.raises(ValueError, match="finite and span less"):
        grid(torch.tensor([[0.0, bad]]), 2, 2)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_clipping_is_the_best_of_all_shrunken_ranges(bits):
    """Each of them by min-max of weights that are cut to it: the same grid, round to nearest of the whole weights."""
    weight = normal(6, 40) ** 3
    best = torch.full((6,), torch.inf)
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    for percent in range(25, 101, 5):
        ends = torch.cat([low, high], 1) * (percent / 100)
        found = grid(ends, bits, 2)
        shrunk = found.scales.float() * (
            (weight / found.scales.float() + found.zeros).round().clamp(0, 2**bits - 1) - found.zeros
        )
        best = torch.minimum(best, (shrunk - weight).square().sum(1))
    clipped = (grid(weight, bits, 40, "mse").decode() - weight).square().sum(1)
    assert torch.allclose(clipped, best, rtol=1e-4)
    assert clipped.sum() < error(weight, grid(weight, bits, 40))


def test_rates_of_vectors_lie_between_a_half_and_four_bits():
    names = {d: [r.name for r in k_means(vector_length=d).rates()] for d in (1, 2, 4)}
    assert names[1] == [f"1x{2**w}" for w in range(1, 5)]
    assert names[2] == [f"2x{2**w}" for w in range(1, 9)]
    assert names[4] == [f"4x{2**w}" for w in range(2, 13)]


def test_rates_of_two_lengths_are_merged():
    both = k_means(vector_length=[2, 4]).rates()
    assert {r.name for r in both} == {r.name for d in (2, 4) for r in k_means(vector_length=d).rates()}
    assert [r.name for r in both if r.index_bits == 2] == ["2x16", "4x256"]
    assert [r.index_bits for r in both[:4]] == [0.5, 0.5, 0.75, 1.0]


def test_rates_of_product_and_residual():
    assert [(r.name, r.index_bits) for r in product(num_tables=3).rates()][3] == ("3x2x16", 2.0)
    assert [(r.name, r.index_bits) for r in residual().rates()] == [(f"4x{2**w}+{2**w}", w / 2) for w in range(1, 9)]


@pytest.mark.parametrize("make", [k_means, product, residual])
@pytest.mark.parametrize("sample", [None, 4])
def test_another_seed_gives_other_codes_and_another_table_group_too(make, sample):
    weights = [normal(24, 13)]
    codebook = make(sample=sample)
    name = codebook.rates()[2].name
    first, again, other = (as_bytes(rounded(make(sample=sample, seed=seed), weights, name)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first != as_bytes(rounded(codebook, weights, name, table_group="another"))


def channel_slice(name, group=0, tower="language", reads=""):
    return ChannelSlice(Site(name, tower, name.rsplit(".", 1)[-1], None, 8, 6, reads), group, torch.arange(6))


def test_table_groups_are_as_wide_as_the_share():
    members = [channel_slice(f"l.{i}.{kind}", g, reads=f"l.{i}.qkv") for i in (0, 1) for kind in ("q", "k") for g in (0, 1)]
    members.append(channel_slice("v.0.q", 0, "vision"))
    number = {s: len({k_means(share=s).table_group(p) for p in members}) for s in ("layer", "input", "kind")}
    assert number == {"layer": 9, "input": 5, "kind": 5}
    assert k_means(share="input").table_group(members[0]) == k_means(share="input").table_group(members[2])
    assert k_means(share="kind").table_group(members[0]) == k_means(share="kind").table_group(members[4])
    assert k_means(share="kind").table_group(members[0]) != k_means(share="kind").table_group(members[-1])


@each_share
def test_scales_are_there_where_layers_share_and_are_their_root_mean_square(share):
    weights = [0.1 * normal(24, 13), 7 * normal(16, 9, seed=1)]
    stored = rounded(k_means(share=share), weights, "2x8")
    assert stored[0].table is stored[1].table
    for w, s in zip(weights, stored, strict=True):
        if share == "layer":
            assert s.scale is None
        else:
            assert s.scale.item() == pytest.approx(w.square().mean().sqrt().item(), rel=FP16)


@pytest.mark.parametrize("share", ["input", "kind"])
def test_layers_of_a_shared_table_may_differ_in_size_alone(share):
    weight = normal(24, 13)
    first, second = rounded(k_means(share=share), [weight, 64 * weight], "2x8")
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(64 * first.decode(), second.decode())


@each_share
@pytest.mark.parametrize("table", ["fp16", "int8"])
def test_few_vectors_are_met_up_to_the_table(share, table):
    weight = normal(9, 1)
    stored = rounded(k_means(share=share, vector_length=1, table=table), [weight], "1x16")[0]
    assert (stored.decode() - weight).abs().max() <= (2 * FP16 if table == "fp16" else 1 / 250) * weight.abs().max()


def test_an_int8_table_is_stored_as_one_and_costs_little():
    weight = normal(64, 64)
    fp16, int8 = (rounded(k_means(table=t, iterations=20), [weight], "2x16")[0] for t in ("fp16", "int8"))
    assert int8.table.dtype == torch.int8
    assert error(weight, int8) == pytest.approx(error(weight, fp16), rel=1e-3)


def brute(fitted, vectors, root):
    """The least distance in the metric over all entries of each table, in double precision, stage after stage."""
    rest = (vectors if fitted.scale is None else vectors / fitted.scale.float()).double()
    subspaces = len(fitted.table) // fitted.stages
    tables = fitted.table.double() if fitted.step is None else fitted.table.double() * fitted.step.double()[:, None, None]
    codes = torch.empty(*vectors.shape[:2], fitted.stages, dtype=torch.long)
    for v in range(vectors.shape[1]):
        for stage in range(fitted.stages):
            table = tables[v % subspaces * fitted.stages + stage]
            codes[:, v, stage] = ((rest[:, v, None] - table) @ root.double().T).square().sum(2).argmin(1)
            rest[:, v] -= table[codes[:, v, stage]]
    return codes


@pytest.mark.parametrize("make", [k_means, product, residual])
@pytest.mark.parametrize("settings", [dict(), dict(table="int8"), dict(share="kind")], ids=["plain", "int8", "shared"])
@pytest.mark.parametrize("rooted", [False, True])
def test_codes_are_those_of_an_exhaustive_search(make, settings, rooted):
    codebook = make(**settings)
    weights = [normal(20, 12), 3 * normal(7, 24, seed=1)]
    for weight, fitted in zip(weights, fit(codebook, weights, codebook.rates()[3].name), strict=True):
        length = fitted.vector_length
        root = torch.eye(length) + normal(length, length, seed=2).triu() if rooted else None
        vectors = to_vectors(weight, length)
        codes, _ = fitted.encode(vectors, 0, root)
        assert torch.equal(codes.long(), brute(fitted, vectors, torch.eye(length) if root is None else root))


def test_padding_takes_no_part_with_a_root_that_is_zero_there():
    weight = normal(10, 5)
    (fitted,) = fit(k_means(vector_length=4), [weight], "4x16")
    root = torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    vectors = to_vectors(weight, 4)[:, 1:]
    codes, values = fitted.encode(vectors, 1, root)
    assert (codes.long() != brute(fitted, vectors, torch.eye(4))).any()
    nearest = (weight[:, 4:] - fitted.table.float()[0, :, 0]).abs().amin(1)
    assert torch.allclose((values[:, 0, 0] - weight[:, 4]).abs(), nearest)


def test_each_table_of_a_product_knows_its_channels():
    """Channels 0, 1 of every 4 take two values, channels 2, 3 two others: with a table each, two centroids meet them all."""
    signs = normal(30, 12).sign().unflatten(1, (-1, 2))
    signs[:, :, 1] = signs[:, :, 0]
    weight = (signs * torch.tensor([1.0, 5.0]).repeat(3)[:, None]).flatten(1)
    assert error(weight, rounded(product(iterations=20), [weight], "2x2x2")[0]) < 1e-6
    assert error(weight, rounded(k_means(iterations=20), [weight], "2x2")[0]) > 1


def test_a_product_stores_only_the_tables_that_its_vectors_come_to():
    codebook = product(num_tables=4, share="kind")
    narrow, wide = normal(8, 3), normal(8, 5)
    assert len(rounded(codebook, [narrow], "4x2x4")[0].table) == 2
    assert {len(s.table) for s in rounded(codebook, [narrow, wide], "4x2x4")} == {3}


def test_the_second_stage_takes_most_of_what_the_first_leaves():
    weight = normal(64, 64)
    one, two, as_many_bits = (
        error(weight, rounded(make(vector_length=4, iterations=20), [weight], name)[0])
        for make, name in ((k_means, "4x16"), (residual, "4x16+16"), (k_means, "4x256"))
    )
    assert as_many_bits < two < 0.6 * one


def test_empty_clusters_are_flagged_by_table_group(monkeypatch):
    monkeypatch.setattr(vector_module, "kmeans", lambda x, k, *_: Clusters(x[:k].clone(), 3))
    flags = []
    rounded(k_means(), [normal(24, 13)], "2x4", table_group="first", flags=flags)
    rounded(product(), [normal(24, 13)], "2x2x4", table_group="second", flags=flags)
    assert flags == ["empty_cluster:first:3", "empty_cluster:second:6"]


@each_share
@pytest.mark.parametrize("vector_length", [2, 3, 4])
def test_weighting_lowers_the_weighted_error_and_raises_the_plain_one(share, vector_length):
    weights = [normal(48, 12), 2 * normal(48, 12, seed=1)]
    importances = [10.0 ** torch.linspace(-2, 2, 12).roll(5 * i) for i in range(2)]
    codebooks = [k_means(share=share, vector_length=vector_length, weight_power=power) for power in (0.0, 1.0)]
    plain, weighted = (rounded(c, weights, c.rates()[3].name, importances) for c in codebooks)
    for w, e, p, q in zip(weights, importances, plain, weighted, strict=True):
        assert error(w, q, e) < error(w, p, e)
    assert sum(map(error, weights, weighted)) > sum(map(error, weights, plain))


@pytest.mark.parametrize("in_features", [12, 13])
def test_equal_energies_weigh_nothing(in_features):
    """Also where the last vector is padded: its zeros, which nobody decodes, must not take part in the fit either way."""
    weight, importance = normal(48, in_features), torch.full((in_features,), 7.0)
    plain, weighted = (as_bytes(rounded(k_means(weight_power=p), [weight], "2x8", [importance])) for p in (0.0, 1.0))
    assert plain == weighted


def test_only_weighting_needs_energies():
    assert not any(c.needs_importance for c in (k_means(), product(), residual(), Scalar(group_size=None, clip="mse")))
    codebook = k_means(weight_power=0.5)
    assert codebook.needs_importance
    with pytest.raises(UserError, match=r"codebook\.weight_power=0\.5"):
        rounded(codebook, [normal(8, 4)], "2x4")


def test_a_layer_that_saw_no_activation_is_not_destroyed():
    """All its importances are 0; without a fallback every vector would get code 0."""
    weight, flags = normal(32, 8), []
    (stored,) = rounded(k_means(weight_power=1.0), [weight], "2x16", [torch.zeros(8)], table_group="dead", flags=flags)
    assert error(weight, stored) < 0.5 * weight.square().sum().item()
    assert flags == ["no_activation:dead"]


MIN_MAX = Scalar(group_size=64, clip="min_max")
TRELLIS = Trellis(state_bits=8, values="hybrid")


@pytest.mark.parametrize(
    ("good", "name", "value"),
    [
        (k_means(), "vector_length", 0), (k_means(), "vector_length", 17), (k_means(), "vector_length", 2.5),
        (k_means(), "vector_length", []), (k_means(), "vector_length", [2, 2]), (k_means(), "vector_length", [2, 0]),
        (k_means(), "share", "tower"), (k_means(), "table", "fp8"), (k_means(), "weight_power", -0.1),
        (k_means(), "weight_power", 1.1), (k_means(), "weight_power", float("nan")), (k_means(), "iterations", 0),
        (k_means(), "iterations", 1.5), (k_means(), "sample", 0), (k_means(), "sample", "all"),
        (product(), "num_tables", 1), (product(), "num_tables", 2.5), (product(), "share", "tower"),
        (residual(), "vector_length", 0),
        (MIN_MAX, "group_size", 0), (MIN_MAX, "group_size", -64), (MIN_MAX, "group_size", 0.5), (MIN_MAX, "group_size", "row"),
        (MIN_MAX, "clip", "max"),
        (TRELLIS, "state_bits", 4), (TRELLIS, "state_bits", 9), (TRELLIS, "state_bits", 12.0), (TRELLIS, "values", "table"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_named_with_its_value(good, name, value):
    # Built without __init__, where the type checker of the tests, which a run does not have, would speak first.
    bad = object.__new__(type(good))
    for key, setting in (vars(good) | {name: value}).items():
        object.__setattr__(bad, key, setting)
    shown = str(value).replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(UserError, match=rf"codebook\.{name} .*{shown}"):
        bad.__post_init__()
