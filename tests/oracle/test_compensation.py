"""Block-LDL rounding, one-sided, two-sided and shrunk, against closed forms, textbook loops, and exhaustive search."""

import hashlib
import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from mgvq.compensation import ldl
from mgvq.compensation.foem import Foem
from mgvq.compensation.hessian import Hessian
from mgvq.compensation.hessian_two_sided import HessianTwoSided
from mgvq.compensation.ldl import block_ldl
from mgvq.compensation.ldlq import BATCH
from mgvq.compensation.none import NoCompensation
from mgvq.errors import UserError
from mgvq.protocols import FittedSlice
from mgvq.types import ChannelSlice, Metric, Site


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


def slices_of(tables, groups, num_out=8, num_in=None):
    site = Site("layer", "language", "layer", None, num_out, num_in or sum(map(len, groups)))
    return [
        FittedSlice(ChannelSlice(site, g, torch.tensor(c)), Table(t)) for g, (t, c) in enumerate(zip(tables, groups, strict=True))
    ]


def decoded(slices, codes, num_in):
    weight = torch.zeros(len(codes[0]), num_in)
    for fitted, code in zip(slices, codes, strict=True):
        columns = fitted.channel_slice.columns.long()
        weight[:, columns] = fitted.codebook.table[code].flatten(1)[:, : len(columns)]
    return weight


def cost(error, hessian):
    return float(((error.double() @ hessian.double()) * error.double()).sum())


def kronecker_cost(error, h_in, h_out):
    return float((h_out.double() @ error.double() @ h_in.double() * error.double()).sum())


def damped(hessian, damping, of="mean"):
    diagonal = hessian.double().diagonal()
    unit = {"mean": diagonal.mean(), "median": diagonal.median(), "channel": diagonal}[of]
    return hessian.double() + damping * torch.diag(unit * torch.ones_like(diagonal))


ORDERS = {
    "one block": [[0, 1, 2, 3]],
    "pairs, shuffled": [[3, 0], [2, 5], [4, 1]],
    "single": [[2], [0], [1]],
    "padded": [[3, 0], [1, -1], [4, 2], [5, -1]],
}


@pytest.mark.parametrize("of", ["mean", "median", "channel"])
@pytest.mark.parametrize("slots", ORDERS.values(), ids=ORDERS.keys())
def test_factors_multiply_to_the_damped_hessian(slots, of) -> None:
    slots = torch.tensor(slots)
    order = slots.flatten()
    real = order >= 0
    hessian = hessian_of(int(real.sum()))
    factors = block_ldl(hessian, slots, 0.1, of)
    blocks = [root.T.double() @ root.double() for root in factors.root]
    product = factors.lower.double() @ torch.block_diag(*blocks) @ factors.lower.double().T
    chosen = order[real]
    torch.testing.assert_close(product[real][:, real], damped(hessian, 0.1, of)[chosen][:, chosen], rtol=1e-5, atol=1e-5)
    for at in range(len(slots)):
        here = slice(at * slots.shape[1], (at + 1) * slots.shape[1])
        torch.testing.assert_close(factors.lower[here, here], torch.eye(slots.shape[1]), atol=1e-6, rtol=0)
        assert not factors.lower[here, here.stop :].any()
    assert not product[~real].any(), "padding costs nothing"


def test_damping_grows_until_it_helps_and_says_so() -> None:
    tokens = normal(2, 6)
    singular = tokens.T @ tokens - 0.2 * torch.eye(6)
    assert block_ldl(singular, torch.arange(6).view(3, 2), 0.01).damping > 0.01
    indefinite = torch.tensor([[1.0, 1.5], [1.5, 1.0]])
    assert block_ldl(indefinite, torch.arange(2).view(1, 2), 0.02).damping == 1, "the unit itself comes last, whatever came first"
    with pytest.raises(ValueError, match="not finite"):
        block_ldl(torch.full((2, 2), torch.nan), torch.arange(2).view(1, 2), 0.01)
    flags: list[str] = []
    slices = slices_of([normal(4, 2)], [list(range(6))])
    Hessian(damping=0.01).round(normal(8, 6), Metric((singular,)), slices, torch.ones(6), flags)
    assert flags[-1].startswith("damping:layer:0.1") or flags[-1].startswith("damping:layer:1")


def with_a_massive_channel(hessian, size):
    """Channel 0 times the root of `size`, as at the first token of a passage: its diagonal alone makes the mean."""
    scale = torch.ones(len(hessian))
    scale[0] = size**0.5
    return scale[:, None] * hessian * scale


@pytest.mark.parametrize("of", ["median", "channel"])
def test_a_massive_channel_leaves_the_feedback_of_the_others_alone(of) -> None:
    """With a damping of .1 of the mean there is none left: the others are rounded to nearest."""
    num_in = 24
    hessian, slots = hessian_of(num_in), torch.arange(num_in)[:, None].flip(0)  # channel 0 is rounded first
    plain = block_ldl(hessian, slots, 0.1).lower.tril(-1)[:-1, :-1]

    def feedback(of):
        return block_ldl(with_a_massive_channel(hessian, 1e5), slots, 0.1, of).lower.tril(-1)[:-1, :-1]

    assert feedback("mean").norm() < 0.01 * plain.norm()
    assert (feedback(of) - plain).norm() < 0.3 * plain.norm()


def test_a_massive_channel_does_not_cost_the_others_their_compensation() -> None:
    """Where the channel itself is stored exactly. Else its error comes to the others, and damping by the mean keeps it off."""
    num_in, rest = 24, slice(1, None)
    table, score = torch.linspace(-2, 2, 5)[:, None], torch.arange(num_in, 0, -1).float()
    ratios = []
    for seed in range(5):
        weight, hessian = normal(32, num_in, seed=seed), with_a_massive_channel(hessian_of(num_in, seed=10 * seed), 1e5)
        weight[:, 0], costs = weight[:, 0].round().clamp(-2, 2), {}
        for of in ("mean", "median", "channel"):
            slices = slices_of([table], [range(num_in)], 32)
            codes = Hessian(damping=0.1, damping_of=of).round(weight, Metric((hessian,)), slices, score, [])
            error = weight - decoded(slices, codes, num_in)
            costs[of] = cost(error[:, rest], hessian[rest, rest])
        ratios.append([costs["median"] / costs["mean"], costs["channel"] / costs["mean"]])
    assert (torch.tensor(ratios).mean(0) < 0.7).all()


def test_damping_by_channel_does_not_see_how_channels_are_scaled() -> None:
    """A norm's output times 2 and the weight's column by 2 is the same layer."""
    num_in, scale = 12, 4.0 ** torch.randint(-4, 5, (12,), generator=torch.Generator().manual_seed(3))
    hessian, slots = hessian_of(num_in), torch.arange(num_in)[:, None]
    plain = block_ldl(hessian, slots, 0.1, "channel").lower
    scaled = block_ldl(scale[:, None] * hessian * scale, slots, 0.1, "channel").lower
    torch.testing.assert_close(scaled, scale[:, None] * plain / scale, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(block_ldl(scale[:, None] * hessian * scale, slots, 0.1).lower, scale[:, None] * plain / scale)


@pytest.mark.parametrize("of", ["mean", "median", "channel"])
def test_dead_channels_take_any_damping(of) -> None:
    """Half of them and more, so that the median is zero; and all."""
    for alive in (2, 0):
        hessian = torch.block_diag(hessian_of(2) if alive else torch.zeros(2, 2), torch.zeros(4, 4))
        slices, weight = slices_of([normal(16, 2, seed=3)], [range(6)]), normal(8, 6)
        codes = Hessian(damping=0.1, damping_of=of).round(weight, Metric((hessian,)), slices, torch.ones(6), [])[0]
        nearest = slices[0].codebook.encode(weight.unflatten(1, (3, 2)), 0, None)[0]
        assert torch.equal(codes[:, alive // 2 :], nearest[:, alive // 2 :])


def test_the_order_of_damage_puts_the_channel_first_that_its_rate_harms_most() -> None:
    """A channel of four times the score at one bit more has nothing to correct: that at few bits goes first."""
    seen: list[int] = []

    class Spy(Table):
        def encode(self, targets, first, root):
            seen.append(len(self.table))
            return super().encode(targets, first, root)

    score = torch.tensor([3.0, 3.0, 1.0, 1.0])
    slices = [
        replace(piece, codebook=Spy(piece.codebook.table), distortion=distortion)
        for piece, distortion in zip(
            slices_of([normal(16, 2), normal(4, 2, seed=1)], [[0, 1], [2, 3]]), (4.0**-2, 4.0**-1), strict=True
        )
    ]
    for order, expected in (("score", [16, 4]), ("damage", [4, 16])):
        seen.clear()
        Hessian(damping=0.01, order=order).round(normal(8, 4), Metric((hessian_of(4),)), slices, score, [])
        assert seen == expected


def test_the_cost_is_the_sum_of_what_the_roundings_cost() -> None:
    """tr(Delta H Delta^T) = sum_j |root_j (target_j - value_j)|^2 with the damped H (docs/method.md, eq. (ldlq))."""
    num_in, paid = 10, []
    hessian, weight = hessian_of(num_in), normal(8, num_in)

    class Recording(Table):
        def encode(self, targets, first, root):
            codes, values = super().encode(targets, first, root)
            paid.append(((targets - values).double() @ root.T.double()).square().sum())
            return codes, values

    slices = [
        FittedSlice(p.channel_slice, Recording(p.codebook.table)) for p in slices_of([normal(8, 2, seed=5)], [range(num_in)])
    ]
    codes = Hessian(damping=0.01).round(weight, Metric((hessian,)), slices, normal(num_in).abs(), [])
    error = weight - decoded(slices, codes, num_in)
    assert cost(error, damped(hessian, 0.01)) == pytest.approx(float(sum(paid)), rel=1e-4)


def test_feedback_is_the_best_change_of_what_is_free() -> None:
    """After the first vector is rounded, the second's target is the minimiser of the quadratic form over its columns."""
    num_in, seen = 4, {}
    hessian, weight = hessian_of(num_in), normal(8, num_in)

    class Spy(Table):
        def encode(self, targets, first, root):
            seen[first] = targets[:, 0]
            return super().encode(targets, first, root)

    slices = [FittedSlice(p.channel_slice, Spy(p.codebook.table)) for p in slices_of([normal(8, 2, seed=5)], [range(num_in)])]
    codes = Hessian(damping=0.01).round(weight, Metric((hessian,)), slices, torch.tensor([1.0, 1, 2, 2]), [])
    full = damped(hessian, 0.01)
    error = (decoded(slices, codes, num_in) - weight)[:, 2:].double()  # the more sensitive pair went first
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


@pytest.mark.parametrize("num_in", [7, 2 * BATCH + 3])
def test_single_columns_in_order_are_the_textbook_gptq_loop(num_in) -> None:
    """More columns than a batch: the lazy feedback is that of one column after the other."""
    hessian, weight, table = hessian_of(num_in), normal(16, num_in), torch.linspace(-2, 2, 9)[:, None]
    slices = slices_of([table], [range(num_in)], 16)
    codes = Hessian(damping=0.01).round(weight, Metric((hessian,)), slices, torch.ones(num_in), [])
    torch.testing.assert_close(decoded(slices, codes, num_in).double(), gptq(weight, hessian, table, 0.01), rtol=1e-6, atol=1e-6)


def test_one_block_is_exhaustive_search() -> None:
    hessian, weight, table = hessian_of(3), normal(5, 3), normal(32, 3, seed=9)
    slices = slices_of([table], [range(3)], 5)
    codes = Hessian(damping=0.01).round(weight, Metric((hessian,)), slices, torch.ones(3), [])[0][:, 0]
    full = damped(hessian, 0.01)
    for row, code in zip(weight, codes, strict=True):
        assert int(code) == min(range(32), key=lambda k: cost((row - table[k])[None], full))


def test_an_identity_metric_is_plain_rounding() -> None:
    slices = slices_of([normal(16, 2, seed=3), normal(4, 3, seed=4)], [[0, 2, 3, 7], [1, 4, 5, 6, 8, 9]])
    weight, score = normal(8, 10), normal(10).abs()
    plain = NoCompensation().round(weight, None, slices, score, [])
    compensated = Hessian(damping=0.01).round(weight, Metric((torch.eye(10),)), slices, score, [])
    assert all(torch.equal(a, b) for a, b in zip(plain, compensated, strict=True))


def test_compensation_lowers_the_cost_and_groups_of_any_length_work() -> None:
    groups = [[0, 2, 3, 8, 9], [1, 4, 5, 6, 7, 10, 11]]
    slices = slices_of([normal(16, 2, seed=3), normal(32, 3, seed=4)], groups, 32)
    wins = []
    for seed in range(5):
        hessian, weight = hessian_of(12, seed=10 * seed), normal(32, 12, seed=seed)
        score = hessian.diagonal()
        errors = [
            weight - decoded(slices, method.round(weight, Metric((hessian,)), slices, score, []), 12)
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
        slices = slices_of([table], [range(num_in)])
        results.append(decoded(slices, Hessian(damping=0.01).round(w, Metric((h,)), slices, s, []), num_in))
    torch.testing.assert_close(results[1], results[0][:, order])


def test_runs_of_rows_with_their_own_metric_are_rounded_apart() -> None:
    """GuidedQuant's metric: 7 rows in runs of 4 and 3."""
    hessians, weight, table = (hessian_of(6), hessian_of(6, seed=30)), normal(7, 6), normal(16, 2, seed=3)
    slices = slices_of([table], [range(6)], 7)
    together = Hessian(damping=0.01).round(weight, Metric(hessians), slices, torch.ones(6), [])[0]
    for rows, hessian in zip((slice(0, 4), slice(4, 7)), hessians, strict=True):
        alone = Hessian(damping=0.01).round(weight[rows], Metric((hessian,)), slices, torch.ones(6), [])[0]
        assert torch.equal(together[rows], alone)


def test_dead_channels_are_rounded_to_nearest_and_flagged() -> None:
    hessian = torch.block_diag(hessian_of(4), torch.zeros(2, 2))
    slices, weight, flags = slices_of([normal(16, 2, seed=3)], [range(6)]), normal(8, 6), []
    codes = Hessian(damping=0.01).round(weight, Metric((hessian,)), slices, torch.ones(6), flags)[0]
    nearest = slices[0].codebook.encode(weight.unflatten(1, (3, 2)), 0, None)[0]
    assert torch.equal(codes[:, 2], nearest[:, 2])
    assert flags == ["dead_channels:layer:2"]


def test_greedy_feedback_is_near_the_best_of_all_codes() -> None:
    """Exhaustive search over all code words of a row of two pairs."""
    hessian, table, weight = hessian_of(4), normal(8, 2, seed=3), normal(20, 4, seed=7)
    slices = slices_of([table], [range(4)], 20)
    score = hessian.diagonal()
    reached = decoded(slices, Hessian(damping=1e-6).round(weight, Metric((hessian,)), slices, score, []), 4)
    words = torch.stack([torch.cat([table[a], table[b]]) for a, b in itertools.product(range(8), repeat=2)])
    best = sum(min(cost((row - word)[None], hessian) for word in words) for row in weight)
    assert best <= cost(weight - reached, hessian) + 1e-6
    assert cost(weight - reached, hessian) <= 1.5 * best


def test_the_codes_are_those_of_the_first_implementation() -> None:
    """Two groups, two metrics, more columns than a batch: the bytes of a commit that studies were run with."""
    num_in = BATCH + 12
    columns = torch.randperm(num_in, generator=torch.Generator().manual_seed(2))
    groups = [columns[:60].sort().values.tolist(), columns[60:].sort().values.tolist()]
    slices = slices_of([normal(16, 2, seed=3), normal(32, 3, seed=4)], groups)
    metric = Metric((hessian_of(num_in), hessian_of(num_in, seed=30)))
    codes = Hessian(damping=0.01).round(normal(8, num_in), metric, slices, normal(num_in).abs(), [])
    assert hashlib.sha256(b"".join(c.numpy().tobytes() for c in codes)).hexdigest()[:16] == "efeec9f01694d4b6"


def greedy_by_elimination(weight, h_in, h_out, table, columns, rows):
    """One tile after the other takes the code with which the best continuation of all free weights costs least.

    Dense: the quadratic form of all weights, the free ones eliminated by a Schur complement; no factorisation.
    """
    num_out, num_in = weight.shape
    form = torch.kron(h_out, h_in)
    delta = torch.zeros(num_out * num_in, dtype=torch.float64)
    free, fixed, codes = set(range(num_out * num_in)), [], {}
    for vector in columns:
        for row in rows:
            tile = [row * num_in + column for column in vector]
            free -= set(tile)
            rest, kept = sorted(free), fixed + tile
            schur = form[kept][:, kept]
            if rest:
                schur = schur - form[kept][:, rest] @ torch.linalg.solve(form[rest][:, rest], form[rest][:, kept])
            errors = weight[row, vector].double() - table.double()
            trial = torch.cat([delta[fixed].expand(len(table), -1), errors], 1)
            codes[row, tuple(vector)] = code = int(((trial @ schur) * trial).sum(1).argmin())
            delta[tile] = errors[code]
            fixed = kept
    return codes


def kronecker_problem(num_out, num_in, seed=0):
    metric = Metric((hessian_of(num_in, seed=10 * seed + 1),), hessian_of(num_out, seed=10 * seed + 5))
    return normal(num_out, num_in, seed=seed), metric


@pytest.mark.parametrize("seed", range(3))
def test_two_sided_is_greedy_over_the_dense_quadratic_form(seed) -> None:
    num_out, num_in = 5, 8
    weight, metric = kronecker_problem(num_out, num_in, seed)
    table, score = normal(8, 2, seed=50 + seed), normal(num_in, seed=60 + seed).abs()
    slices = slices_of([table], [range(num_in)], num_out)
    codes = HessianTwoSided(damping=0.01, output_damping=0.02).round(weight, metric, slices, score, [])[0]
    vectors = [[2 * v, 2 * v + 1] for v in score.view(-1, 2).mean(1).argsort(descending=True).tolist()]
    rows = metric.h_out.diagonal().argsort(descending=True).tolist()
    expected = greedy_by_elimination(weight, damped(metric.h_in[0], 0.01), damped(metric.h_out, 0.02), table, vectors, rows)
    assert {(r, (2 * v, 2 * v + 1)): int(codes[r, v]) for r in range(num_out) for v in range(num_in // 2)} == expected


def two_sided_loop(weight, h_in, h_out, table):
    """The textbook double loop over single weights, last column and last row first (docs/method.md, eq. (two-sided-ldlq))."""
    lower_in, lower_out = (torch.linalg.cholesky(h) for h in (h_in, h_out))
    lower_in, lower_out = (c / c.diagonal() for c in (lower_in, lower_out))
    weight = weight.double()
    delta, value = torch.zeros_like(weight), torch.zeros_like(weight)
    for column in reversed(range(weight.shape[1])):
        for row in reversed(range(weight.shape[0])):
            target = weight[row, column] + lower_out[row:, row] @ delta[row:, column:] @ lower_in[column:, column]
            value[row, column] = table[(table - target).abs().argmin()]
            delta[row, column] = weight[row, column] - value[row, column]
    return value


def test_two_sided_single_weights_are_the_textbook_double_loop() -> None:
    """More columns than a batch, and rows that are sorted already: the last one has the largest diagonal."""
    num_out, num_in = 12, BATCH + 9
    weight, metric = kronecker_problem(num_out, num_in)
    scale = torch.linspace(0.5, 8, num_out) / metric.h_out.diagonal().sqrt()
    h_out = scale[:, None] * metric.h_out * scale
    table = torch.linspace(-2, 2, 9)[:, None]
    slices = slices_of([table], [range(num_in)], num_out)
    score = torch.arange(num_in).float()
    codes = HessianTwoSided(damping=0.01, output_damping=0.02).round(weight, Metric(metric.h_in, h_out), slices, score, [])
    expected = two_sided_loop(weight, damped(metric.h_in[0], 0.01), damped(h_out, 0.02), table.double()[:, 0])
    torch.testing.assert_close(decoded(slices, codes, num_in).double(), expected)


def test_two_sided_with_an_output_factor_of_the_identity_is_one_sided() -> None:
    slices = slices_of([normal(16, 2, seed=3), normal(32, 3, seed=4)], [[0, 2, 3, 8, 9], [1, 4, 5, 6, 7, 10, 11]], 32)
    weight, score, hessian = normal(32, 12), normal(12).abs(), hessian_of(12)
    one = Hessian(damping=0.01).round(weight, Metric((hessian,)), slices, score, [])
    two = HessianTwoSided(damping=0.01, output_damping=0.02).round(
        weight, Metric((hessian,), 3 * torch.eye(32)), slices, score, []
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_two_sided_cost_is_the_sum_of_what_the_roundings_cost() -> None:
    """tr(H_O Delta H_I Delta^T) = sum_rj s_r |root_j E_rj|^2 with the damped factors (eq. (two-sided-ldlq))."""
    num_out, num_in, paid = 8, 10, {}
    weight, metric = kronecker_problem(num_out, num_in)

    class Recording(Table):
        def encode(self, targets, first, root):
            codes, values = super().encode(targets, first, root)
            paid[first] = ((targets - values)[:, 0].double() @ root.T.double()).square().sum(1)  # of the last round
            return codes, values

    slices = [
        FittedSlice(p.channel_slice, Recording(p.codebook.table)) for p in slices_of([normal(8, 2, seed=5)], [range(num_in)])
    ]
    codes = HessianTwoSided(damping=0.01, output_damping=0.02).round(weight, metric, slices, normal(num_in).abs(), [])
    error = weight - decoded(slices, codes, num_in)
    order = metric.h_out.diagonal().argsort()
    gain = torch.empty(num_out, dtype=torch.float64)
    gain[order] = torch.linalg.cholesky(damped(metric.h_out, 0.02)[order][:, order]).diagonal().square()
    full = kronecker_cost(error, damped(metric.h_in[0], 0.01), damped(metric.h_out, 0.02))
    assert full == pytest.approx(float(sum((gain * p).sum() for p in paid.values())), rel=1e-4)


def test_two_sided_lowers_the_kronecker_cost_of_one_sided() -> None:
    """The cost of one-sided compensation is below that of plain rounding."""
    slices = slices_of([normal(16, 2, seed=3)], [range(12)], 24)
    methods = NoCompensation(), Hessian(damping=0.01), HessianTwoSided(damping=0.01, output_damping=0.02)
    costs = torch.zeros(6, len(methods))
    for seed, row in enumerate(costs):
        weight, metric = kronecker_problem(24, 12, seed)
        for m, method in enumerate(methods):
            error = weight - decoded(slices, method.round(weight, metric, slices, metric.channel_importance(), []), 12)
            row[m] = kronecker_cost(error, metric.h_in[0], metric.h_out)
    assert (costs[:, 2] < costs[:, 1]).all()
    plain, one, two = costs.sum(0).tolist()
    assert two < 0.85 * one < 0.85 * 0.85 * plain


def test_two_sided_needs_one_pair_of_factors_and_flags_damping() -> None:
    slices, weight, compensation = (
        slices_of([normal(4, 2)], [range(6)]),
        normal(8, 6),
        HessianTwoSided(damping=0.01, output_damping=0.02),
    )
    for metric in (Metric((torch.eye(6),)), Metric((torch.eye(6), torch.eye(6)), torch.eye(8))):
        with pytest.raises(UserError, match="curvature=kronecker"):
            compensation.round(weight, metric, slices, torch.ones(6), [])
    flags: list[str] = []
    gradients = normal(2, 8)
    compensation.round(
        weight, Metric((torch.eye(6),), gradients.T @ gradients - 0.1 * torch.eye(8)), slices, torch.ones(6), flags
    )
    assert [f.rsplit(":", 1)[0] for f in flags] == ["output_damping:layer"]


def foem_loop(weight, hessian, table, beta):
    """Single columns, last first, each at the weight plus (1 - beta) of what the errors behind it ask for."""
    lower = torch.linalg.cholesky(hessian)
    lower = lower / lower.diagonal()
    weight, value = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for column in reversed(range(weight.shape[1])):
        behind = slice(column + 1, None)
        target = weight[:, column] + (1 - beta) * (weight - value)[:, behind] @ lower[behind, column]
        value[:, column] = table[(target[:, None] - table).abs().argmin(1)]
    return value


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_foem_is_its_textbook_loop(beta) -> None:
    num_in = BATCH + 9
    hessian, weight, table = hessian_of(num_in), normal(16, num_in), torch.linspace(-2, 2, 9)[:, None]
    slices = slices_of([table], [range(num_in)], 16)
    codes = Foem(damping=0.01, beta=beta).round(weight, Metric((hessian,)), slices, torch.arange(num_in).float(), [])
    expected = foem_loop(weight, damped(hessian, 0.01), table.double()[:, 0], beta)
    torch.testing.assert_close(decoded(slices, codes, num_in).double(), expected)


def test_foem_goes_from_the_full_correction_to_none() -> None:
    """beta 0: the codes of `hessian`; 1: every vector nearest to its weights in the metric of its block."""
    slices = slices_of([normal(16, 2, seed=3), normal(32, 3, seed=4)], [[0, 2, 3, 8, 9], [1, 4, 5, 6, 7, 10, 11]], 32)
    weight, score, metric = normal(32, 12), normal(12).abs(), Metric((hessian_of(12),))
    full = Hessian(damping=0.01).round(weight, metric, slices, score, [])
    assert all(
        torch.equal(a, b)
        for a, b in zip(full, Foem(damping=0.01, beta=0.0).round(weight, metric, slices, score, []), strict=True)
    )
    slices = slices_of([normal(16, 2, seed=3)], [range(12)], 32)
    codes = Foem(damping=0.01, beta=1.0).round(weight, metric, slices, torch.arange(12).float(), [])[0]
    roots = block_ldl(metric.h_in[0], torch.arange(12).view(6, 2), 0.01).root
    for v, root in enumerate(roots):
        assert torch.equal(codes[:, v], slices[0].codebook.encode(weight[:, None, 2 * v : 2 * v + 2], v, root)[0][:, 0])


@pytest.mark.parametrize(
    ("variant", "settings", "named"),
    [
        (Hessian, dict(damping=0.0), "damping"),
        (HessianTwoSided, dict(damping=2.0, output_damping=0.1), "damping"),
        (HessianTwoSided, dict(damping=0.01, output_damping=0.0), "output_damping"),
        (Foem, dict(damping=-1.0, beta=0.1), "damping"),
        (Foem, dict(damping=0.01, beta=1.1), "beta"),
    ],
)
def test_a_bad_setting_is_named(variant, settings, named) -> None:
    with pytest.raises(UserError, match=rf"compensation\.{named} must lie in .*got {settings[named]}"):
        variant(**settings)


@pytest.mark.parametrize("variant", [Hessian, HessianTwoSided, Foem])
@pytest.mark.parametrize(("setting", "words"), [("damping_of", "mean, median, channel"), ("order", "score or damage")])
def test_a_word_that_there_is_not_is_named(variant, setting, words) -> None:
    rest = {HessianTwoSided: dict(output_damping=0.1), Foem: dict(beta=0.1)}.get(variant, {})
    with pytest.raises(UserError, match=rf"compensation\.{setting} must be .*{words}.* got 'row'"):
        variant(damping=0.1, **rest, **{setting: "row"})


def test_factors_are_computed_once_inside_a_block(monkeypatch) -> None:
    computed, factor = [], ldl._block_ldl
    monkeypatch.setattr(ldl, "_block_ldl", lambda *arguments: computed.append(arguments) or factor(*arguments))
    hessian, slots = hessian_of(4), torch.arange(4).view(2, 2)
    calls = [(hessian, slots, 0.1), (hessian.clone(), slots, 0.1), (hessian, slots.flip(0), 0.1), (hessian, slots, 0.2)]
    with ldl.factors_kept():
        found = [ldl.block_ldl(*call) for call in calls]
    assert found[0] is found[1]
    assert len(computed) == 3
    assert ldl.block_ldl(*calls[0]) is not found[0]  # what was kept is gone
