"""A diagonal and few directions in place of an output factor, against the dense matrix that it stands for."""

from dataclasses import replace

import pytest
import torch
from test_refit import CODEBOOKS, coded, factor, normal

from mgvq.curvature.kronecker import KroneckerFisher
from mgvq.errors import UserError
from mgvq.linalg import DiagonalPlusLowRank, damped
from mgvq.quantization.limits import Limits
from mgvq.refit.closed_form import ClosedForm
from mgvq.types import Kronecker, LayerProblem, Metric, Site, SiteStats

CURVATURE = KroneckerFisher(granularity="sequence", fusion="none", rounds=None)


def spiked(size, spikes, seed):
    """Few large eigenvalues over many small ones, as output Fishers have them."""
    directions = normal(size, spikes, seed=seed)
    return factor(size, seed + 1) / size + directions @ directions.T


def pair(rank, num_out=24, num_in=10):
    """The same metric, structured and dense."""
    h_in, low_rank = factor(num_in, 3), DiagonalPlusLowRank.of(spiked(num_out, 2, 5), rank)
    return Metric((h_in,), low_rank), Metric((h_in,), low_rank.dense())


@pytest.mark.parametrize("matrix", [factor(9, 1), spiked(9, 2, 1), torch.diag(torch.arange(9.0)), torch.zeros(9, 9)])
def test_full_rank_is_the_matrix(matrix) -> None:
    found = DiagonalPlusLowRank.of(matrix, 9)
    torch.testing.assert_close(found.dense(), matrix, rtol=1e-5, atol=1e-5)
    assert found.dense().dtype == matrix.dtype


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_diagonal_is_kept_and_the_rest_is_positive(rank) -> None:
    matrix = spiked(20, 4, 7).double()
    found = DiagonalPlusLowRank.of(matrix, rank)
    torch.testing.assert_close(found.diagonal(), matrix.diagonal())
    torch.testing.assert_close(found.dense().diagonal(), matrix.diagonal())
    assert torch.linalg.eigvalsh(matrix - found.factor @ found.factor.T).min() > -1e-9
    assert torch.linalg.eigvalsh(found.dense()).min() > -1e-9


def test_the_directions_are_those_of_the_largest_eigenvalues() -> None:
    matrix = spiked(20, 4, 7).double()
    values, vectors = torch.linalg.eigh(matrix)
    best = (vectors[:, -4:] * values[-4:]) @ vectors[:, -4:].T
    found = DiagonalPlusLowRank.of(matrix, 4).factor
    torch.testing.assert_close(found @ found.T, best, rtol=1e-3, atol=1e-3 * float(best.abs().max()))


def test_products_are_those_of_the_dense_matrix() -> None:
    found, right, rows = DiagonalPlusLowRank.of(spiked(12, 3, 2).double(), 3), normal(12, 5).double(), slice(2, 9)
    torch.testing.assert_close(found @ right, found.dense() @ right)
    torch.testing.assert_close(found[rows, rows].dense(), found.dense()[rows, rows])
    for of in ("mean", "median", "channel"):
        torch.testing.assert_close(found.damped(0.1, of).dense(), damped(found.dense(), 0.1, of))


def test_a_metric_loses_what_its_dense_one_does() -> None:
    structured, dense = pair(3)
    error = normal(24, 10)
    assert structured.loss(error) == pytest.approx(dense.loss(error), rel=1e-5)
    torch.testing.assert_close(structured.gradient(error), dense.gradient(error), rtol=1e-4, atol=1e-4)
    problem = LayerProblem(
        site=Site("layer", "language", "layer", None, 24, 10),
        weight=error,
        target=error,
        metric=structured,
        score=torch.ones(10),
        groups=torch.zeros(10, dtype=torch.long),
    )
    limits = Limits({problem.site: 2.0})
    limit, whole = limits(problem, 0.9 * error), limits(replace(problem, metric=dense), 0.9 * error)
    assert (limit.limit, limit.times) == pytest.approx((whole.limit, whole.times), rel=1e-4)


@pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS.keys())
def test_a_refit_is_that_with_the_dense_matrix(codebook) -> None:
    tables = []
    for metric in pair(3):
        slices = coded(codebook, [normal(24, 10)], torch.tensor([0, 2, 3, 5, 6, 9]), [metric])
        (fitted,) = ClosedForm(damping=0.1, rounds=1)(slices)
        tables.append(fitted.table)
        assert not torch.equal(fitted.table, slices[0].fitted.codebook.table)
    assert torch.equal(*tables)


def test_layers_with_few_outputs_keep_their_whole_factor() -> None:
    sites = [Site(name, "language", name, 0, size, 6) for name, size in (("k_proj", 4), ("fc1", 12))]
    bank = {s: SiteStats({"image": 0, "text": 9}, {}, sequence=Kronecker(factor(6, 1), factor(s.out_features, 2))) for s in sites}
    whole, cut = CURVATURE.fuse(bank), replace(CURVATURE, output_rank=2).fuse(bank)
    assert torch.equal(cut[sites[0]].h_out, whole[sites[0]].h_out)
    assert cut[sites[1]].h_out.factor.shape == (12, 2)
    torch.testing.assert_close(cut[sites[1]].h_out.diagonal(), whole[sites[1]].h_out.diagonal())


@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_that_is_no_number_of_directions_is_refused(rank) -> None:
    with pytest.raises(UserError, match=r"curvature\.output_rank must be a whole number"):
        replace(CURVATURE, output_rank=rank)
