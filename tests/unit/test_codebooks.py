"""Every codebook meets its contract (exact bits, same seed same bytes, a higher rate is better), and Uniform the budget."""

import itertools

import pytest
import torch

from mgvq.allocation.uniform import Uniform
from mgvq.codebook import kmeans as kmeans_module
from mgvq.codebook.kmeans import KMeans
from mgvq.codebook.lloyd import Clusters
from mgvq.codebook.scalar import Scalar
from mgvq.errors import UserError
from mgvq.types import Site, SiteStats


def k_means(**settings):
    defaults = dict(vector_length=2, share="layer", weight_power=0.0, iterations=3, sample=None, seed=0)
    return KMeans(**(defaults | settings))


def site(name, out_features, in_features, tower="language"):
    return Site(name, tower, name.rsplit(".", 1)[-1], None, out_features, in_features)


SITES = [
    site("language.0.q_proj", 24, 13),
    site("language.1.q_proj", 16, 13),
    site("language.0.down_proj", 6, 65),
    site("projector.linear", 9, 1, tower="projector"),
    site("vision.0.q_proj", 7, 5, tower="vision"),
]
CODEBOOKS = {
    **{f"scalar-{g}": Scalar(group_size=g) for g in (64, 5, None)},
    **{f"kmeans-{s}-{d}": k_means(share=s, vector_length=d) for s in ("layer", "kind") for d in (1, 2, 3, 4)},
}
each_codebook = pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS.keys())
a_few_codebooks = pytest.mark.parametrize("name", ["scalar-64", "kmeans-layer-2", "kmeans-kind-3"])
each_k_means = pytest.mark.parametrize("share", ["layer", "kind"])


def draw(sites=SITES, seed=0):
    """Weights of another size in every layer."""
    draws = torch.Generator().manual_seed(seed)
    return {s: 0.02 * (i + 1) * torch.randn(s.out_features, s.in_features, generator=draws) for i, s in enumerate(sites)}


def flat(quantized):
    return {(s.name, role): t for s, w in quantized.weights.items() for role, t in w.tensors().items()}


def as_bytes(quantized):
    return {key: tensor.numpy().tobytes() for key, tensor in flat(quantized).items()}


def error(weights, quantized, energy=1.0):
    return sum((energy * (quantized.weights[s].decode() - w) ** 2).sum().item() for s, w in weights.items())


@each_codebook
@pytest.mark.parametrize("step", [0, 3])
def test_the_predicted_bits_are_those_of_the_stored_tensors(codebook, step):
    for sites in (SITES, SITES[1:2], SITES[3:]):
        rate = codebook.rates()[step]
        tensors = flat(codebook.quantize(draw(sites), rate, None)).values()
        stored = {id(t): t.nbytes for t in tensors}  # a table that layers share is one tensor
        assert codebook.storage_bits(sites, rate) == 8 * sum(stored.values())


@each_codebook
def test_what_is_decoded_has_the_shape_of_the_weight_and_its_order(codebook):
    weights = draw()
    quantized = codebook.quantize(weights, codebook.rates()[1], None)
    assert list(quantized.weights) == list(weights)
    for s, w in quantized.weights.items():
        assert w.shape == w.decode().shape == (s.out_features, s.in_features)
        assert w.decode().dtype == torch.float32
        assert w.decode().isfinite().all()


@each_codebook
def test_the_same_seed_gives_the_same_bytes_and_weights_are_left_alone(codebook):
    weights = draw()
    first, second = (as_bytes(codebook.quantize(weights, codebook.rates()[2], None)) for _ in range(2))
    assert first == second
    assert all(torch.equal(weights[s], w) for s, w in draw().items())


@each_codebook
def test_a_higher_rate_is_closer(codebook):
    weights = draw()
    errors = [error(weights, codebook.quantize(weights, codebook.rates()[step], None)) for step in (0, 1, 3)]
    assert errors[0] > errors[1] > errors[2]


@each_codebook
def test_rates_have_their_own_names_and_rise(codebook):
    rates = codebook.rates()
    assert len({r.name for r in rates}) == len(rates)
    for lower, higher in itertools.pairwise(rates):
        assert lower.index_bits < higher.index_bits
        assert codebook.storage_bits(SITES, lower) < codebook.storage_bits(SITES, higher)


@each_k_means
@pytest.mark.parametrize("sample", [None, 4])
def test_another_seed_gives_other_codes(share, sample):
    weights = draw()
    first, again, other = (
        as_bytes((c := k_means(share=share, sample=sample, seed=seed)).quantize(weights, c.rates()[2], None))
        for seed in (0, 0, 1)
    )
    assert first == again
    assert all(first[s.name, "codes"] != other[s.name, "codes"] for s in SITES[:3])


def test_a_table_is_shared_by_a_kind_within_a_tower_only():
    codebook = k_means(share="kind")
    first, second, down, _, vision = codebook.quantize(draw(), codebook.rates()[2], None).weights.values()
    assert first.table is second.table
    assert len({id(w.table) for w in (first, down, vision)}) == 3
    for s, w in draw().items():
        scale = codebook.quantize({s: w}, codebook.rates()[2], None).weights[s].scale.item()
        assert scale == pytest.approx(w.square().mean().sqrt().item(), rel=2.0**-11)


def test_layers_of_a_shared_table_may_differ_in_size_alone():
    weights = draw(SITES[:1])
    (weight,) = weights.values()
    codebook, twin = k_means(share="kind"), site("language.2.q_proj", 24, 13)
    first, second = codebook.quantize(weights | {twin: 64 * weight}, codebook.rates()[2], None).weights.values()
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(64 * first.decode(), second.decode())


@each_k_means
def test_few_vectors_are_met_up_to_fp16(share):
    weights = draw(SITES[3:4])
    codebook = k_means(share=share, vector_length=1)
    (quantized,) = codebook.quantize(weights, codebook.rates()[4], None).weights.values()
    assert torch.allclose(quantized.decode(), weights[SITES[3]], rtol=2.0**-10)


def test_empty_clusters_are_flagged_by_table(monkeypatch):
    monkeypatch.setattr(kmeans_module, "kmeans", lambda x, k, *_: Clusters(x[:k].clone(), 3))
    codebook = k_means()
    flags = codebook.quantize(draw(SITES[:2]), codebook.rates()[1], None).flags
    assert flags == ("empty_cluster:language.0.q_proj:3", "empty_cluster:language.1.q_proj:3")


def stats(energy, seed=0):
    """Statistics of 40 image and 24 text tokens whose channels have about this mean square, as `curvature.input` takes them."""
    x = torch.randn(64, len(energy), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * energy.sqrt()
    parts = {"image": x[:40], "text": x[40:]}
    return SiteStats({m: len(p) for m, p in parts.items()}, {m: p.T @ p for m, p in parts.items()})


@each_k_means
@pytest.mark.parametrize("vector_length", [2, 3, 4])
def test_weighting_lowers_the_weighted_error_and_raises_the_plain_one(share, vector_length):
    sites = [site(f"language.{i}.q_proj", 48, 12) for i in range(2)]
    weights = draw(sites)
    bank = {s: stats(10.0 ** torch.linspace(-2, 2, 12).roll(5 * i)) for i, s in enumerate(sites)}
    energies = {s: b.second_moment().diagonal() for s, b in bank.items()}
    plain, weighted = (
        (c := k_means(share=share, vector_length=vector_length, weight_power=power)).quantize(weights, c.rates()[3], bank)
        for power in (0.0, 1.0)
    )
    for s, w in weights.items():
        assert error({s: w}, weighted, energies[s]) < error({s: w}, plain, energies[s])
    assert error(weights, weighted) > error(weights, plain)


@pytest.mark.parametrize("in_features", [12, 13])
def test_equal_energies_weigh_nothing(in_features):
    """Also where the last vector is padded: its zeros, which nobody decodes, must not take part in the fit either way."""
    s = site("language.0.q_proj", 48, in_features)
    bank = {s: SiteStats({"text": 4}, {"text": 4 * 7.0 * torch.eye(in_features, dtype=torch.float64)})}
    plain, weighted = (
        as_bytes((c := k_means(weight_power=power)).quantize(draw([s]), c.rates()[2], bank)) for power in (0.0, 1.0)
    )
    assert plain == weighted


def test_weight_power_needs_statistics():
    codebook = k_means(weight_power=0.5)
    with pytest.raises(UserError, match=r"codebook\.weight_power"):
        codebook.quantize(draw(), codebook.rates()[0], None)


def test_a_layer_that_saw_no_activation_is_not_destroyed():
    """All its importances are 0; without a fallback every vector would get code 0."""
    s = site("language.0.q_proj", 32, 8)
    weights = draw([s])
    bank = {s: SiteStats({"text": 0}, {"text": torch.zeros(8, 8, dtype=torch.float64)})}
    codebook = k_means(weight_power=1.0)
    quantized = codebook.quantize(weights, codebook.rates()[3], bank)
    assert error(weights, quantized) < 0.5 * weights[s].square().sum().item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("weight_power", [0.0, 1.0])
@each_k_means
def test_a_gpu_gives_the_bytes_of_the_cpu(share, weight_power):
    weights = draw()
    bank = {s: stats(torch.linspace(0.1, 4, s.in_features, dtype=torch.float64)) for s in SITES}
    codebook = k_means(share=share, weight_power=weight_power)
    on_cpu = codebook.quantize(weights, codebook.rates()[2], bank)
    on_gpu = codebook.quantize({s: w.cuda() for s, w in weights.items()}, codebook.rates()[2], bank)
    assert as_bytes(on_cpu) == {key: t.cpu().numpy().tobytes() for key, t in flat(on_gpu).items()}


@pytest.mark.parametrize(
    ("good", "name", "value"),
    [
        (k_means(), "vector_length", 0), (k_means(), "vector_length", 17), (k_means(), "vector_length", 2.5),
        (k_means(), "share", "tower"), (k_means(), "weight_power", -0.1), (k_means(), "weight_power", 1.1),
        (k_means(), "weight_power", float("nan")), (k_means(), "iterations", 0),
        (k_means(), "iterations", 1.5), (k_means(), "sample", 0), (k_means(), "sample", "all"),
        (Scalar(group_size=64), "group_size", 0), (Scalar(group_size=64), "group_size", -64),
        (Scalar(group_size=64), "group_size", 0.5), (Scalar(group_size=64), "group_size", "row"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_named_with_its_value(good, name, value):
    # Built without __init__, where the type checker of the tests, which a run does not have, would speak first.
    bad = object.__new__(type(good))
    for key, setting in (vars(good) | {name: value}).items():
        object.__setattr__(bad, key, setting)
    with pytest.raises(UserError, match=rf"codebook\.{name} .*{value}"):
        bad.__post_init__()


@a_few_codebooks
@pytest.mark.parametrize("tolerance", [0.0, 0.1])
def test_uniform_takes_the_best_rate_that_fits(name, tolerance):
    codebook = CODEBOOKS[name]
    num_weights = sum(s.num_weights for s in SITES)
    costs = {rate: codebook.storage_bits(SITES, rate) / num_weights for rate in codebook.rates()}
    least, most = min(costs.values()), max(costs.values())
    chosen = []
    for budget in [least, most, *(least * (most / least) ** (i / 20) for i in range(1, 22))]:
        limit = budget * (1 + tolerance)
        if max(cost for cost in costs.values() if cost <= limit) < 0.75 * budget and limit < most:
            with pytest.raises(UserError, match="between two rates"):
                Uniform(tolerance=tolerance)(SITES, codebook, budget)
            continue
        rate = Uniform(tolerance=tolerance)(SITES, codebook, budget)
        assert costs[rate] <= limit
        assert all(cost > limit for other, cost in costs.items() if other.size > rate.size)
        chosen.append(rate)
    assert {codebook.rates()[0], codebook.rates()[-1]} <= set(chosen)


def test_uniform_takes_the_finest_of_rates_that_cost_the_same():
    one_weight = [site("language.0.q_proj", 1, 1)]  # any code of 1 to 8 bits takes a byte
    assert Uniform(tolerance=0.0)(one_weight, Scalar(group_size=None), 64.0).size == 8


@a_few_codebooks
def test_uniform_names_the_smallest_rate_where_nothing_fits(name):
    codebook = CODEBOOKS[name]
    num_weights = sum(s.num_weights for s in SITES)
    smallest = codebook.rates()[0]
    cost = codebook.storage_bits(SITES, smallest) / num_weights
    with pytest.raises(UserError, match=rf"budget\.bits_per_weight=.* {smallest.name}, .* {cost:.3f} bits"):
        Uniform(tolerance=0.1)(SITES, codebook, cost / 1.11)


@pytest.mark.parametrize("tolerance", [-0.01, 0.51, float("nan")])
def test_a_bad_tolerance_is_named(tolerance):
    with pytest.raises(UserError, match=rf"allocation\.tolerance .*{tolerance}"):
        Uniform(tolerance=tolerance)
