"""From fitted tables to stored layers: the objective against its dense form, and what the refit and further rounds do to it."""

from itertools import product

import pytest
import torch
from conftest import layer_problems, sampled

from mgvq.codebook.kmeans import KMeans
from mgvq.compensation.hessian import Hessian
from mgvq.compensation.none import NoCompensation
from mgvq.formats.grouped import pack_groups
from mgvq.quantization.codebooks import CodebookCache
from mgvq.quantization.rounding import LayerRounder
from mgvq.quantization.table_groups import cut_table_groups
from mgvq.refit.closed_form import ClosedForm
from mgvq.types import Metric, Site

SIZES = {"a": (12, 14), "b": (12, 14), "c": (8, 14)}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factor(size, seed):
    tokens = normal(3 * size, size, seed=seed) @ normal(size, size, seed=seed + 1)
    return tokens.T @ tokens / len(tokens)


def problem(share="layer", seed=0):
    """Three layers in two groups, two of one kind; with share=kind those two have tables in common."""
    sites = [
        Site(f"layers.{i}.{name}", "language", "k" if name != "c" else "other", i, *SIZES[name]) for i, name in enumerate("abc")
    ]
    weights = {s: normal(s.out_features, s.in_features, seed=seed + i) for i, s in enumerate(sites)}
    metrics = {s: Metric((factor(14, seed + 10 * i),), factor(s.out_features, seed + 10 * i + 5)) for i, s in enumerate(sites)}
    codebook = KMeans(vector_length=2, share=share, table="fp16", weight_power=0.0, iterations=3, sample=None, seed=0)
    scores = {s: normal(14, seed=seed).abs() for s in sites}
    groups = {s: torch.arange(14) % 2 for s in sites}
    problems = layer_problems(sites, weights=weights, metrics=metrics, scores=scores, groups=groups)
    table_groups = cut_table_groups(problems, codebook)
    return sites, CodebookCache(table_groups, codebook, problems), [codebook.rates()[1]] * len(table_groups)


def rounded(parts, compensation, refit):
    sites, cache, rates = parts
    return LayerRounder(cache, rates, compensation, refit, ids_of(sites)).round(sites, [])


def ids_of(sites):
    return {s.reads: pack_groups(torch.arange(14) % 2) for s in sites}


def loss(parts, result, sites=None):
    problems = parts[1].problems
    return sum(problems[s].metric.loss(result.decoded[s] - problems[s].weight) for s in sites or parts[0])


@pytest.mark.parametrize("runs", [1, 2, 3])
@pytest.mark.parametrize("output", [True, False])
def test_the_loss_of_a_metric_is_its_dense_form(runs: int, output: bool) -> None:
    error, h_in = normal(8, 5), tuple(factor(5, 10 * k) for k in range(runs))
    h_out = factor(8, 99) if output else torch.eye(8)
    size = -(-8 // runs)
    expected = 0.0
    for k, h in enumerate(h_in):
        rows = slice(k * size, (k + 1) * size)
        part = error[rows].double()
        expected += 0.5 * float(part.flatten() @ torch.kron(h_out[rows, rows].double(), h.double()) @ part.flatten())
    assert Metric(h_in, h_out if output else None).loss(error) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("compensation", "share"), sampled(product([NoCompensation(), Hessian(damping=0.01)], ["layer", "kind"]), 2)
)
def test_neither_refit_nor_further_rounds_raise_the_objective(compensation, share: str) -> None:
    for seed in range(4):
        parts = problem(share, 100 * seed)
        losses = [
            loss(parts, rounded(parts, compensation, refit))
            for refit in (None, *(ClosedForm(damping=0.0, rounds=r) for r in (1, 2, 4)))
        ]
        assert losses[1] < losses[0]
        assert losses == sorted(losses, reverse=True)


def test_what_is_stored_is_what_was_decoded_and_tables_in_common_stay_so() -> None:
    parts = problem("kind")
    result = rounded(parts, Hessian(damping=0.01), ClosedForm(damping=0.0, rounds=2))
    for site, stored in result.stored.items():
        torch.testing.assert_close(stored.decode(), result.decoded[site])
    first, second, other = (w.tensors() for w in result.stored.values())
    assert first["0.table"] is second["0.table"]
    assert first["0.table"] is not other["0.table"]


def test_layers_without_a_table_in_common_do_not_change_each_other() -> None:
    parts = problem("layer")
    together = rounded(parts, Hessian(damping=0.01), ClosedForm(damping=0.0, rounds=2))
    for site in parts[0]:
        alone = rounded(([site], *parts[1:]), Hessian(damping=0.01), ClosedForm(damping=0.0, rounds=2))
        assert torch.equal(alone.decoded[site], together.decoded[site])


def test_proxy_errors_are_of_each_part() -> None:
    parts = problem()
    result = rounded(parts, Hessian(damping=0.01), ClosedForm(damping=0.0, rounds=1))
    plain, feedback = (rounded(parts, c, None) for c in (NoCompensation(), Hessian(damping=0.01)))
    for site in parts[0]:
        scale = parts[1].problems[site].metric.loss(parts[1].problems[site].weight)
        expected = {
            "nearest": loss(parts, plain, [site]),
            "feedback": loss(parts, feedback, [site]),
            "refit": loss(parts, result, [site]),
        }
        assert result.proxy[site] == pytest.approx({part: value / scale for part, value in expected.items()})


def test_a_moved_target_is_rounded_and_measured_against_full_precision() -> None:
    """What is rounded is the target; what the proxy error compares with stays the weight of full precision."""
    parts = problem()
    site, cache = parts[0][0], parts[1]
    moved = cache.with_targets({site: cache.problems[site].weight + normal(*SIZES["a"], seed=7)})
    result = rounded(([site], moved, parts[2]), Hessian(damping=0.01), None)
    own = cache.problems[site]
    error = own.metric.loss(result.decoded[site] - own.weight) / own.metric.loss(own.weight)
    assert result.proxy[site]["feedback"] == pytest.approx(error)
    assert error > own.metric.loss(result.decoded[site] - moved.problems[site].target) / own.metric.loss(own.weight)


def test_table_groups_in_which_others_have_slices_keep_their_tables_when_a_target_moves() -> None:
    sites, cache, rates = problem("kind")
    moved = cache.with_targets({s: 2 * cache.problems[s].weight for s in (sites[0], sites[2])})
    for u, table_group in enumerate(cache.table_groups):
        kept = cache(u, rates[u])[0][0] is moved(u, rates[u])[0][0]
        assert kept == any(channel_slice.site == sites[1] for channel_slice in table_group.slices)
