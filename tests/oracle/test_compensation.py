"""Block-LDL rounding against closed forms, a textbook GPTQ loop, and exhaustive search."""

import itertools
from dataclasses import dataclass

import pytest
import torch

from mgvq.compensation.hessian import _BATCH, Hessian
from mgvq.compensation.ldl import block_ldl
from mgvq.compensation.none import NoCompensation
from mgvq.types import FittedPiece, Metric, Piece, Site


@dataclass(frozen=True)
class Table:
    """A minimal codebook: every vector takes the entry of a table that is nearest in the metric."""

    table: torch.Tensor  # (k, d)

    @property
    def vector_length(self):
        return self.table.shape[1]

    def encode(self, targets, first, root):
        root = torch.eye(self.vector_length) if root is None else root
        difference = targets[..., None, :] - self.table
        codes = (difference.double() @ root.T.double()).square().sum(-1).argmin(-1)
        return codes, self.table[codes]

    def rows(self, part):
        return self

    def weight(self, codes):
        raise NotImplementedError


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian_of(num_in, num_tokens=None, seed=1):
    tokens = normal(num_tokens or 3 * num_in, num_in, seed=seed) @ normal(num_in, num_in, seed=seed + 1)
    return tokens.T @ tokens / len(tokens)


def pieces_of(tables, groups, num_out=8, num_in=None):
    site = Site("layer", "language", "layer", None, num_out, num_in or sum(map(len, groups)))
    return [FittedPiece(Piece(site, g, torch.tensor(c)), Table(t)) for g, (t, c) in enumerate(zip(tables, groups, strict=True))]


def decoded(pieces, codes, num_in):
    weight = torch.zeros(len(codes[0]), num_in)
    for fitted, code in zip(pieces, codes, strict=True):
        columns = fitted.piece.columns.long()
        weight[:, columns] = fitted.codebook.table[code].flatten(1)[:, : len(columns)]
    return weight


def cost(error, hessian):
    return float(((error.double() @ hessian.double()) * error.double()).sum())


def damped(hessian, damping):
    return hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


ORDERS = {
    "one block": [[0, 1, 2, 3]],
    "pairs, shuffled": [[3, 0], [2, 5], [4, 1]],
    "single": [[2], [0], [1]],
    "padded": [[3, 0], [1, -1], [4, 2], [5, -1]],
}


@pytest.mark.parametrize("slots", ORDERS.values(), ids=ORDERS.keys())
def test_factors_multiply_to_the_damped_hessian(slots) -> None:
    slots = torch.tensor(slots)
    order = slots.flatten()
    real = order >= 0
    hessian = hessian_of(int(real.sum()))
    factors = block_ldl(hessian, slots, 0.01)
    blocks = [root.T.double() @ root.double() for root in factors.root]
    product = factors.lower.double() @ torch.block_diag(*blocks) @ factors.lower.double().T
    chosen = order[real]
    torch.testing.assert_close(product[real][:, real], damped(hessian, 0.01)[chosen][:, chosen], rtol=1e-5, atol=1e-5)
    for at in range(len(slots)):
        here = slice(at * slots.shape[1], (at + 1) * slots.shape[1])
        torch.testing.assert_close(factors.lower[here, here], torch.eye(slots.shape[1]), atol=1e-6, rtol=0)
        assert not factors.lower[here, here.stop :].any()
    assert not product[~real].any(), "padding costs nothing"


def test_damping_grows_until_it_helps_and_says_so() -> None:
    tokens = normal(2, 6)
    singular = tokens.T @ tokens - 0.2 * torch.eye(6)
    assert block_ldl(singular, torch.arange(6).view(3, 2), 0.01).damping > 0.01
    with pytest.raises(ValueError, match="not finite"):
        block_ldl(torch.full((2, 2), torch.nan), torch.arange(2).view(1, 2), 0.01)
    flags: list[str] = []
    pieces = pieces_of([normal(4, 2)], [list(range(6))])
    Hessian(damping=0.01).round(normal(8, 6), Metric((singular,)), pieces, torch.ones(6), flags)
    assert flags[-1].startswith("damping:layer:0.1") or flags[-1].startswith("damping:layer:1")


def test_the_cost_is_the_sum_of_what_the_roundings_cost() -> None:
    """tr(Delta H Delta^T) = sum_j |root_j (target_j - value_j)|^2 with the damped H: method 2.0, residual identity."""
    num_in, paid = 10, []
    hessian, weight = hessian_of(num_in), normal(8, num_in)

    class Recording(Table):
        def encode(self, targets, first, root):
            codes, values = super().encode(targets, first, root)
            paid.append(((targets - values).double() @ root.T.double()).square().sum())
            return codes, values

    pieces = [FittedPiece(p.piece, Recording(p.codebook.table)) for p in pieces_of([normal(8, 2, seed=5)], [range(num_in)])]
    codes = Hessian(damping=0.01).round(weight, Metric((hessian,)), pieces, normal(num_in).abs(), [])
    error = weight - decoded(pieces, codes, num_in)
    assert cost(error, damped(hessian, 0.01)) == pytest.approx(float(sum(paid)), rel=1e-4)


def test_feedback_is_the_best_change_of_what_is_free() -> None:
    """After the first vector is rounded, the second's target is the minimiser of the quadratic form over its columns."""
    num_in, seen = 4, {}
    hessian, weight = hessian_of(num_in), normal(8, num_in)

    class Spy(Table):
        def encode(self, targets, first, root):
            seen[first] = targets[:, 0]
            return super().encode(targets, first, root)

    pieces = [FittedPiece(p.piece, Spy(p.codebook.table)) for p in pieces_of([normal(8, 2, seed=5)], [range(num_in)])]
    codes = Hessian(damping=0.01).round(weight, Metric((hessian,)), pieces, torch.tensor([1.0, 1, 2, 2]), [])
    full = damped(hessian, 0.01)
    error = (decoded(pieces, codes, num_in) - weight)[:, 2:].double()  # the more sensitive pair went first
    optimum = -error @ full[2:, :2] @ torch.linalg.inv(full[:2, :2])
    torch.testing.assert_close(seen[0].double(), weight[:, :2].double() + optimum, rtol=1e-5, atol=1e-5)


def gptq(weight, hessian, table, damping):
    """The textbook loop: columns from left to right, the error divided by the diagonal of the inverse's Cholesky factor."""
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(hessian, damping)), upper=True)
    weight, quantised = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    for column in range(weight.shape[1]):
        nearest = (weight[:, column, None] - table.double()[None, :, 0]).abs().argmin(1)
        quantised[:, column] = table.double()[nearest, 0]
        error = (weight[:, column] - quantised[:, column]) / upper[column, column]
        weight[:, column:] -= error[:, None] * upper[column, None, column:]
    return quantised


@pytest.mark.parametrize("num_in", [7, 2 * _BATCH + 3])
def test_single_columns_in_order_are_the_textbook_gptq_loop(num_in) -> None:
    """More columns than a batch: the lazy feedback is that of one column after the other."""
    hessian, weight, table = hessian_of(num_in), normal(16, num_in), torch.linspace(-2, 2, 9)[:, None]
    pieces = pieces_of([table], [range(num_in)], 16)
    codes = Hessian(damping=0.01).round(weight, Metric((hessian,)), pieces, torch.ones(num_in), [])
    torch.testing.assert_close(decoded(pieces, codes, num_in).double(), gptq(weight, hessian, table, 0.01), rtol=1e-6, atol=1e-6)


def test_one_block_is_exhaustive_search() -> None:
    hessian, weight, table = hessian_of(3), normal(5, 3), normal(32, 3, seed=9)
    pieces = pieces_of([table], [range(3)], 5)
    codes = Hessian(damping=0.01).round(weight, Metric((hessian,)), pieces, torch.ones(3), [])[0][:, 0]
    full = damped(hessian, 0.01)
    for row, code in zip(weight, codes, strict=True):
        assert int(code) == min(range(32), key=lambda k: cost((row - table[k])[None], full))


def test_an_identity_metric_is_plain_rounding() -> None:
    pieces = pieces_of([normal(16, 2, seed=3), normal(4, 3, seed=4)], [[0, 2, 3, 7], [1, 4, 5, 6, 8, 9]])
    weight, score = normal(8, 10), normal(10).abs()
    plain = NoCompensation().round(weight, None, pieces, score, [])
    compensated = Hessian(damping=0.01).round(weight, Metric((torch.eye(10),)), pieces, score, [])
    assert all(torch.equal(a, b) for a, b in zip(plain, compensated, strict=True))


def test_compensation_lowers_the_cost_and_groups_of_any_length_work() -> None:
    groups = [[0, 2, 3, 8, 9], [1, 4, 5, 6, 7, 10, 11]]
    pieces = pieces_of([normal(16, 2, seed=3), normal(32, 3, seed=4)], groups, 32)
    wins = []
    for seed in range(5):
        hessian, weight = hessian_of(12, seed=10 * seed), normal(32, 12, seed=seed)
        score = hessian.diagonal()
        errors = [
            weight - decoded(pieces, method.round(weight, Metric((hessian,)), pieces, score, []), 12)
            for method in (NoCompensation(), Hessian(damping=0.01))
        ]
        wins.append(cost(errors[1], hessian) < 0.8 * cost(errors[0], hessian))
    assert all(wins)


def test_permuted_channels_give_the_permuted_result() -> None:
    num_in = 8
    hessian, weight, table, score = hessian_of(num_in), normal(8, num_in), normal(16, 1, seed=3), normal(num_in).abs()
    order = torch.randperm(num_in, generator=torch.Generator().manual_seed(0))
    results = []
    for w, h, s in ((weight, hessian, score), (weight[:, order], hessian[order][:, order], score[order])):
        pieces = pieces_of([table], [range(num_in)])
        results.append(decoded(pieces, Hessian(damping=0.01).round(w, Metric((h,)), pieces, s, []), num_in))
    torch.testing.assert_close(results[1], results[0][:, order])


def test_runs_of_rows_with_their_own_metric_are_rounded_apart() -> None:
    """GuidedQuant's metric: 7 rows in runs of 4 and 3."""
    hessians, weight, table = (hessian_of(6), hessian_of(6, seed=30)), normal(7, 6), normal(16, 2, seed=3)
    pieces = pieces_of([table], [range(6)], 7)
    together = Hessian(damping=0.01).round(weight, Metric(hessians), pieces, torch.ones(6), [])[0]
    for rows, hessian in zip((slice(0, 4), slice(4, 7)), hessians, strict=True):
        alone = Hessian(damping=0.01).round(weight[rows], Metric((hessian,)), pieces, torch.ones(6), [])[0]
        assert torch.equal(together[rows], alone)


def test_dead_channels_are_rounded_to_nearest_and_flagged() -> None:
    hessian = torch.block_diag(hessian_of(4), torch.zeros(2, 2))
    pieces, weight, flags = pieces_of([normal(16, 2, seed=3)], [range(6)]), normal(8, 6), []
    codes = Hessian(damping=0.01).round(weight, Metric((hessian,)), pieces, torch.ones(6), flags)[0]
    nearest = pieces[0].codebook.encode(weight.unflatten(1, (3, 2)), 0, None)[0]
    assert torch.equal(codes[:, 2], nearest[:, 2])
    assert flags == ["dead_channels:layer:2"]


def test_greedy_feedback_is_near_the_best_of_all_codes() -> None:
    """Exhaustive search over all code words of a row of two pairs."""
    hessian, table, weight = hessian_of(4), normal(8, 2, seed=3), normal(20, 4, seed=7)
    pieces = pieces_of([table], [range(4)], 20)
    score = hessian.diagonal()
    reached = decoded(pieces, Hessian(damping=1e-6).round(weight, Metric((hessian,)), pieces, score, []), 4)
    words = torch.stack([torch.cat([table[a], table[b]]) for a, b in itertools.product(range(8), repeat=2)])
    best = sum(min(cost((row - word)[None], hessian) for word in words) for row in weight)
    assert best <= cost(weight - reached, hessian) + 1e-6
    assert cost(weight - reached, hessian) <= 1.5 * best
