"""The refit of the centroids against dense normal equations, with every layout of tables."""

import itertools
from dataclasses import replace

import pytest
import torch

from mgvq.codebook.kmeans import KMeans
from mgvq.codebook.product import Product
from mgvq.codebook.residual import Residual
from mgvq.compensation.hessian import Hessian
from mgvq.errors import UserError
from mgvq.formats.vector import VectorWeight, to_vectors
from mgvq.linalg import damped
from mgvq.protocols import CodedSlice, FittedSlice
from mgvq.refit import closed_form
from mgvq.refit.by_centroid import rows_by_centroid
from mgvq.refit.closed_form import ClosedForm
from mgvq.types import ChannelSlice, Metric, Site

LAYER = dict(vector_length=2, share="layer", table="fp16", weight_power=0.0, iterations=3, sample=None, seed=0)
KIND = LAYER | dict(share="kind")
CODEBOOKS = {
    "kmeans": KMeans(**LAYER),
    "kmeans-3": KMeans(**LAYER | dict(vector_length=3)),
    "product": Product(**LAYER, num_tables=2),
    "residual": Residual(**LAYER),
    "kmeans-scaled": KMeans(**KIND),
    "product-scaled": Product(**KIND, num_tables=3),
    "residual-scaled": Residual(**KIND | dict(vector_length=4)),
}
INT8 = {name: replace(codebook, table="int8") for name, codebook in CODEBOOKS.items()}
each_codebook = pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS.keys())


refit = ClosedForm(damping=0.0, rounds=1)


def a_slice(tables, codes, columns, target, metric):
    channel_slice = ChannelSlice(Site("layer", "language", "layer", None, *target.shape), 0, columns)
    return CodedSlice(fitted=FittedSlice(channel_slice, tables), codes=codes, target=target, metric=metric)


def columns_of(channel_slice):
    return channel_slice.fitted.channel_slice.columns


def tables_of(channel_slice):
    return channel_slice.fitted.codebook


def with_tables(channel_slice, tables):
    return replace(channel_slice, fitted=replace(channel_slice.fitted, codebook=tables))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factor(size, seed):
    tokens = normal(3 * size, size, seed=seed) @ normal(size, size, seed=seed + 1)
    return tokens.T @ tokens / len(tokens)


def metric_of(kind, num_out, num_in, seed=0):
    if kind == "kronecker":
        return Metric((factor(num_in, seed + 20),), factor(num_out, seed + 40))
    return Metric(tuple(factor(num_in, seed + 20 + 2 * k) for k in range(1 if kind == "input" else 2)))


def coded(codebook, weights, columns, metrics, step=1):
    """A table group of one slice a layer, rounded to nearest; what the layers lack elsewhere is a tenth of their weights."""
    parts = [w[:, columns] for w in weights]
    fitted = codebook.fit("unit", parts, codebook.rates()[step], [None] * len(parts), [])
    slices = []
    for tables, weight, part, metric in zip(fitted, weights, parts, metrics, strict=True):
        codes, _ = tables.encode(to_vectors(part, tables.vector_length), 0, None)
        target = 0.1 * weight
        target[:, columns] = part
        slices.append(a_slice(tables, codes, columns, target, metric))
    return slices


def group_of(codebook, kind="kronecker", num_layers=1, seed=0, step=1):
    weights = [(i + 1) * normal(12, 14, seed=seed + i) for i in range(num_layers)]
    metrics = [metric_of(kind, 12, 14, seed + 100 * i) for i in range(num_layers)]
    return coded(codebook, weights, torch.tensor([0, 2, 3, 5, 6, 9, 10, 12, 13]), metrics, step)


def quadratic_form(metric, num_out):
    """The matrix of the quadratic form in all errors of a layer, laid end to end."""
    if metric.h_out is not None:
        return torch.kron(metric.h_out, metric.h_in[0]).double()
    rows = -(-num_out // len(metric.h_in))
    return torch.block_diag(*(h for h in metric.h_in for _ in range(rows))).double()


def dense_error(channel_slice, values):
    error = -channel_slice.target.double()
    error[:, columns_of(channel_slice)] += values.double()
    return error.flatten()


def objective(slices, fitted):
    total = 0.0
    for channel_slice, tables in zip(slices, fitted, strict=True):
        error = dense_error(channel_slice, tables.weight(channel_slice.codes).decode())
        total += 0.5 * float(error @ quadratic_form(channel_slice.metric, len(channel_slice.target)) @ error)
    return total


def solved(slices):
    """What the slices stand for at the optimum, from the normal equations of all centroids."""
    table, stages = tables_of(slices[0]).table, tables_of(slices[0]).stages
    normal_matrix, right, designs = 0.0, 0.0, []
    for channel_slice in slices:
        codes = channel_slice.codes.view(*channel_slice.codes.shape[:2], stages)
        tables = torch.eye(table.numel()).view(-1, *table.shape)
        num_in, scale = len(columns_of(channel_slice)), tables_of(channel_slice).scale
        design = torch.stack([
            VectorWeight(codes, one, num_in, None, scale).decode().flatten() for one in tables
        ], 1).double()  # fmt: skip
        designs.append(design)
        inside = torch.zeros(channel_slice.target.shape, dtype=torch.bool)
        inside[:, columns_of(channel_slice)] = True
        form = quadratic_form(channel_slice.metric, len(channel_slice.target))[inside.flatten()]
        normal_matrix = normal_matrix + design.T @ form[:, inside.flatten()] @ design
        right = right + design.T @ form @ channel_slice.target.double().flatten()
    centroids = torch.linalg.lstsq(normal_matrix, right, driver="gelsd").solution
    return [
        (design @ centroids).view(len(channel_slice.target), -1) for design, channel_slice in zip(designs, slices, strict=True)
    ]


@each_codebook
@pytest.mark.parametrize("kind", ["kronecker", "input", "runs"])
def test_it_is_the_solution_of_the_normal_equations(codebook, kind):
    """Up to the fp16 that the tables are stored in. Padding, errors in other columns and scales included."""
    slices = group_of(codebook, kind)
    for channel_slice, fitted, values in zip(slices, refit(slices), solved(slices), strict=True):
        torch.testing.assert_close(fitted.weight(channel_slice.codes).decode().double(), values, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["kmeans-scaled", "product-scaled", "residual-scaled"])
def test_layers_that_share_tables_are_fitted_together(name):
    slices = group_of(CODEBOOKS[name], num_layers=3)
    fitted = refit(slices)
    for channel_slice, tables, values in zip(slices, fitted, solved(slices), strict=True):
        torch.testing.assert_close(tables.weight(channel_slice.codes).decode().double(), values, rtol=2e-3, atol=8e-3)
        assert tables.table is fitted[0].table, "stored once"
        assert tables.scale is tables_of(channel_slice).scale
    assert objective(slices, fitted) < objective(slices, [tables_of(p) for p in slices])


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("table", ["fp16", "int8"])
def test_the_objective_never_rises_as_stored(name, table):
    codebook = (CODEBOOKS if table == "fp16" else INT8)[name]
    for seed in range(5):
        slices = group_of(codebook, "kronecker", 1 + seed % 2 * ("scaled" in name), seed)
        before = objective(slices, [tables_of(p) for p in slices])
        once = refit(slices)
        reached = objective(slices, once)
        assert reached < before
        assert once[0].table.dtype == tables_of(slices[0]).table.dtype
        again = [with_tables(p, f) for f, p in zip(once, slices, strict=True)]
        assert objective(again, refit(again)) <= reached


def test_tables_that_storing_would_worsen_are_kept():
    """The best table differs in its largest centroid alone, whose new step would round all others to other values."""
    for seed in range(5):
        channel_slice = group_of(INT8["kmeans"], seed=seed)[0]
        largest = tables_of(channel_slice).table[0].abs().amax(1).argmax()
        grown = torch.where(channel_slice.codes[:, :, 0] == largest, 1.003, 1.0).repeat_interleave(2, 1)
        grown = grown[:, : len(columns_of(channel_slice))]
        target = torch.zeros_like(channel_slice.target)
        target[:, columns_of(channel_slice)] = grown * tables_of(channel_slice).weight(channel_slice.codes).decode()
        assert refit([replace(channel_slice, target=target)])[0] is tables_of(channel_slice)


def test_a_centroid_that_no_code_names_stays():
    channel_slice = group_of(CODEBOOKS["kmeans"])[0]
    codes = torch.where(channel_slice.codes == 1, 0, channel_slice.codes)
    table = refit([replace(channel_slice, codes=codes)])[0].table[0]
    assert torch.equal(table[1], tables_of(channel_slice).table[0, 1])
    assert not torch.equal(table[0], tables_of(channel_slice).table[0, 0])


@pytest.mark.parametrize(("num_rows", "num_columns"), [(1, 1), (5, 64), (256, 65), (300, 200)])
@pytest.mark.parametrize("num_centroids", [1, 7])
def test_rows_are_summed_by_the_centroid_that_they_name(num_rows: int, num_columns: int, num_centroids: int) -> None:
    """Against a loop, with the order of the rows: to the bit. Sizes on both sides of what is summed at a time."""
    matrix, num_vectors = normal(num_rows, num_columns), 3
    codes = torch.randint(num_centroids, (num_rows, num_vectors), generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(num_vectors, num_centroids, num_columns, dtype=torch.float64)
    for row, vector in itertools.product(range(num_rows), range(num_vectors)):
        expected[vector, codes[row, vector]] += matrix[row].double()
    assert torch.equal(rows_by_centroid(matrix, codes, num_centroids), expected)


@each_codebook
def test_rows_that_are_summed_first_change_nothing(codebook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows and few centroids, as in wide layers, against the same without sums."""
    rows, columns = 400, 12
    target, metric = normal(rows, columns), Metric((factor(columns, 1),), factor(rows, 3))
    rate = codebook.rates()[1]
    (tables,) = codebook.fit("t", [target], rate, [None], [])
    codes, _ = tables.encode(to_vectors(target, tables.vector_length), 0, None)
    part = a_slice(tables, codes, torch.arange(columns), target, metric)
    made = []
    monkeypatch.setattr(closed_form, "rows_by_centroid", lambda *args: made.append(args) or rows_by_centroid(*args))
    (summed,) = refit([part])
    assert made
    monkeypatch.setattr(closed_form, "_FEWER", 10**6)
    (plain,) = refit([part])
    assert len(made) == 1
    torch.testing.assert_close(summed.table.double(), plain.table.double(), rtol=1e-3, atol=1e-3)


def test_slices_of_a_layer_in_turn_lower_the_cost_of_the_layer():
    """Each is refitted to what the other leaves over."""
    weight, metric = normal(16, 12), metric_of("kronecker", 16, 12)
    groups = [torch.arange(0, 12, 2), torch.arange(1, 12, 2)]
    fitted, codes = [], []
    for columns in groups:
        fitted += KMeans(**LAYER).fit("unit", [weight[:, columns]], KMeans(**LAYER).rates()[1], [None], [])
        codes.append(fitted[-1].encode(to_vectors(weight[:, columns], 2), 0, None)[0])

    def rest(but=None):
        left = weight.clone()
        for g, columns in enumerate(groups):
            if g != but:
                left[:, columns] -= fitted[g].weight(codes[g]).decode()
        return left

    costs = [rest().double().flatten() @ quadratic_form(metric, 16) @ rest().double().flatten()]
    for _ in range(3):
        for g, columns in enumerate(groups):
            fitted[g] = refit([a_slice(fitted[g], codes[g], columns, rest(g), metric)])[0]
            costs.append(rest().double().flatten() @ quadratic_form(metric, 16) @ rest().double().flatten())
    assert all(later <= earlier for earlier, later in itertools.pairwise(costs))
    assert costs[2] < costs[1] < costs[0]


def test_a_metric_of_low_rank_or_none_does_no_harm():
    token = normal(1, 14)
    for h_in in (token.T @ token, torch.zeros(14, 14)):
        channel_slice = group_of(CODEBOOKS["kmeans"])[0]
        flat = replace(channel_slice, metric=Metric((h_in,)))
        fitted = refit([flat])
        assert objective([flat], fitted) <= objective([flat], [tables_of(channel_slice)])
        assert fitted[0].table.abs().max() < 10


def with_a_massive_channel(seed):
    """A layer whose largest weight, far outside of its table, is multiplied by what two tokens alone have a thousandfold."""
    codebook, weight, size = KMeans(**LAYER), normal(96, 64, seed=seed), 64
    (tables,) = codebook.fit("unit", [weight], next(r for r in codebook.rates() if r.index_bits == 2.0), [None], [])
    weight[3, 7] = 29.0
    tokens = normal(400, size, seed=seed + 1) @ (normal(size, size, seed=seed + 2) / size**0.5 + torch.eye(size))
    tokens[:2] += 2 * normal(2, size, seed=seed + 3)
    tokens[:2, 7] = 3000.0
    metric = Metric((tokens.T @ tokens / len(tokens),))
    channel_slice = ChannelSlice(Site("layer", "language", "layer", None, 96, size), 0, torch.arange(size))
    fitted = FittedSlice(channel_slice, tables)
    codes = Hessian(damping=0.1).round(weight, metric, [fitted], metric.channel_importance(), [])[0]
    return CodedSlice(fitted=fitted, codes=codes, target=weight, metric=metric)


def test_a_massive_channel_does_not_take_the_weights_of_all_others() -> None:
    """Undamped, a refit halves the loss, which two tokens make, and leaves weights whose error is several times their norm."""

    def relative_error(channel_slice, tables):
        error = tables.weight(channel_slice.codes).decode() - channel_slice.target
        return float(error.square().sum() / channel_slice.target.square().sum())

    for seed in (0, 10, 20):
        channel_slice = with_a_massive_channel(seed)
        before = relative_error(channel_slice, tables_of(channel_slice))
        assert before < 0.3
        assert relative_error(channel_slice, refit([channel_slice])[0]) > 3
        (damped,) = ClosedForm(damping=0.1, rounds=1)([channel_slice])
        assert relative_error(channel_slice, damped) < 2
        assert objective([channel_slice], [damped]) < objective([channel_slice], [tables_of(channel_slice)])


@pytest.mark.parametrize("of", ["mean", "median", "channel"])
def test_a_damped_refit_is_the_refit_in_the_damped_metric(of) -> None:
    channel_slice = group_of(CODEBOOKS["kmeans"])[0]
    metric = channel_slice.metric
    factors = Metric((damped(metric.h_in[0], 0.1, of),), damped(metric.h_out, 0.1, of))
    found, expected = (
        ClosedForm(damping=0.1, damping_of=of, rounds=1)([channel_slice]),
        refit([replace(channel_slice, metric=factors)]),
    )
    torch.testing.assert_close(found[0].table, expected[0].table)
    assert not torch.equal(found[0].table, refit([channel_slice])[0].table)


def test_settings_that_make_no_sense_are_named():
    with pytest.raises(UserError, match=r"refit\.rounds"):
        ClosedForm(damping=0.1, rounds=0)
    with pytest.raises(UserError, match=r"refit\.damping must"):
        ClosedForm(damping=1.1, rounds=1)
    with pytest.raises(UserError, match=r"refit\.damping_of must be one of mean, median, channel"):
        ClosedForm(damping=0.1, damping_of="row", rounds=1)
