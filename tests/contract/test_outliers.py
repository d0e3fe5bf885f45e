"""Outliers with every codebook, every rounding and in a rotated basis: exact, counted, and added to what the codes stand for."""

from dataclasses import replace

import pytest
import torch
from conftest import layer_problems
from transformers import LlamaConfig, LlamaForCausalLM
from variants import built, each

from mgvq.checkpoint.load import FORMATS
from mgvq.codebook.kmeans import KMeans
from mgvq.compensation.hessian import Hessian
from mgvq.formats.outliers import Outliers, OutlierWeight
from mgvq.formats.packing import unpack
from mgvq.quantization.codebooks import CodebookCache
from mgvq.quantization.method import Method
from mgvq.quantization.outliers import find_outliers
from mgvq.quantization.pipeline import layer_problems as problems_of
from mgvq.quantization.pipeline import quantize
from mgvq.quantization.preflight import predicted_bits
from mgvq.quantization.rounding import LayerRounder
from mgvq.quantization.table_groups import cut_table_groups
from mgvq.types import Metric, Site, SiteStats

SITES = [Site(f"layer.{i}.linear", "language", "linear", i, *shape) for i, shape in enumerate([(16, 24), (32, 19), (3, 2)])]
NUMBER = 7
BUDGET = 60.0  # the highest rate, with tables that are larger than these layers


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model():
    """Of the layers alone, each with one weight far away."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    made = LlamaForCausalLM(config)
    made.layer = torch.nn.ModuleList(
        torch.nn.ModuleDict({"linear": torch.nn.Linear(s.in_features, s.out_features, bias=False)}) for s in SITES
    )
    for site, part in zip(SITES, made.layer, strict=True):
        part["linear"].weight.data = 0.1 * normal(site.out_features, site.in_features, seed=site.block)
        part["linear"].weight.data[2, 1] = 5.0
    return made.requires_grad_(False)


def bank():
    tokens = {s: normal(60, s.in_features, seed=s.block) * torch.linspace(0.5, 2, s.in_features) for s in SITES}
    return {
        s: SiteStats(
            num_tokens={"image": 0, "text": 60}, gram={"image": torch.zeros(s.in_features, s.in_features), "text": x.T @ x}
        )
        for s, x in tokens.items()
    }


def method(codebook, compensation="hessian", transform=None, outliers=NUMBER, groups=1):
    needs_metric = compensation != "none" or codebook.needs_importance
    return Method(
        curvature=built("curvature", "input") if needs_metric else None,
        sensitivity=built("sensitivity", "uniform"),
        grouping=built("grouping", "score", f"num_groups={groups}") if groups > 1 else built("grouping", "one"),
        allocation=built("allocation", "uniform", "spread=true", "tolerance=0.0"),
        codebook=codebook,
        compensation=built("compensation", compensation),
        transform=built("transform", "hadamard", *transform) if transform else None,
        outliers=outliers,
    )


@pytest.mark.parametrize("name", each("codebook"))
@pytest.mark.parametrize(
    ("compensation", "transform"),
    [("none", None), ("hessian", None), ("hessian", ("sides=both",))],
    ids=["nearest", "ldlq", "ldlq-rotated"],
)
def test_they_come_back_and_are_counted(name, compensation, transform):
    chosen = method(each("codebook")[name], compensation, transform)
    whole = model()
    report = quantize(whole, SITES, bank(), chosen, BUDGET, None)
    problems = problems_of({s: whole.get_submodule(s.name).weight for s in SITES}, bank(), chosen)
    assert predicted_bits(chosen, SITES, BUDGET) == report.stored_bits / sum(s.num_weights for s in SITES)
    stored = {id(t): t for w in report.weights.values() for t in w.tensors().values()}
    assert report.stored_bits == 8 * sum(t.nbytes for t in stored.values())
    for site, weight in report.weights.items():
        full = whole.get_submodule(site.name).weight
        assert isinstance(weight, OutlierWeight)
        count = min(NUMBER, site.num_weights)
        assert Outliers.storage_bits(full.shape, count) == 8 * sum(t.nbytes for t in weight.outliers.tensors().values())
        taken = weight.outliers.dense() != 0
        assert int(taken.sum()) == count
        assert taken[2, 1]
        assert torch.equal(weight.outliers.dense()[taken], full[taken].half().float())
        assert torch.allclose(
            weight.outliers.dense() + problems[site].in_own_basis(problems[site].weight) * ~taken, full, atol=1e-2
        )
        assert torch.allclose(problems[site].in_own_basis(problems[site].weight), full, atol=1e-5)
        assert torch.allclose(problems[site].of_model(full), problems[site].weight, atol=1e-5)
        back = FORMATS[weight.format].load(weight.tensors(), **weight.settings())
        assert torch.equal(back.decode(), weight.decode())
        assert back.shape == tuple(full.shape)
        assert (weight.decode() - full)[2, 1].abs() < 0.3, "the code of what is left there adds its own small error"


def test_without_any_nothing_changes():
    chosen = [method(each("codebook")["grid"], outliers=n) for n in (0, NUMBER)]
    plain, kept = (quantize(model(), SITES, bank(), one, 6.0, None) for one in chosen)
    assert all(weight.format == "grid" for weight in plain.weights.values())
    assert (kept.layers.relative_error < plain.layers.relative_error).all()


def test_groups_and_rotations_lie_inside():
    chosen = method(each("codebook")["kmeans"], transform=("sides=in", "within=group"), groups=2)
    report = quantize(model(), SITES, bank(), chosen, BUDGET, None)
    for weight in report.weights.values():
        formats = [weight.format, weight.rest.format, weight.rest.inner.format]
        assert formats == ["outliers", "rotated", "grouped"]
        assert torch.equal(FORMATS["outliers"].load(weight.tensors(), **weight.settings()).decode(), weight.decode())


@pytest.mark.parametrize("runs", [1, 2])
def test_the_chosen_are_those_of_the_largest_damage(runs):
    weight = normal(6, 9)
    h_in = tuple(normal(30, 9, seed=k).square().T @ normal(30, 9, seed=k).square() for k in range(runs))
    metric = Metric(h_in)
    damage = {
        (i, j): float(weight[i, j] ** 2 * metric.row_runs(6)[i // (6 // runs)][1][j, j]) for i in range(6) for j in range(9)
    }
    expected = sorted(sorted(damage, key=damage.get)[-5:])
    found = find_outliers(weight, metric, 5)
    assert [(p // 9, p % 9) for p in unpack(found.positions, 6, 5).tolist()] == expected


def test_of_equal_ones_the_first_are_taken_and_a_small_layer_goes_whole():
    assert unpack(find_outliers(torch.ones(3, 4), None, 5).positions, 4, 5).tolist() == [0, 1, 2, 3, 4]
    found = find_outliers(normal(3, 4), None, 100)
    assert torch.equal(found.dense(), normal(3, 4).half().float())


@pytest.mark.parametrize("size", [2.0**-30, 1.0, 1e6])
def test_values_outside_of_fp16_are_as_exact(size):
    weight = size * normal(5, 6)
    found = find_outliers(weight, None, 4)
    taken = found.dense() != 0
    assert torch.allclose(found.dense()[taken], weight[taken], rtol=1e-3)


def test_one_scalar_outlier_takes_36_bits_of_a_layer_of_smollm2():
    assert Outliers.storage_bits((576, 1536), 16) == 16 * 36


def test_one_super_weight_is_what_a_table_cannot_hold():
    """Block 11's down_proj of SmolLM2: 29 sigma on the channel with the largest inputs; its 36 bits save the layer."""
    site = Site("layer.0.down_proj", "language", "down_proj", 0, 256, 512)
    weight = 0.2 * normal(256, 512)
    weight[17, 99] = 29 * 0.2
    tokens = normal(300, 512, seed=1)
    tokens[0, 99] = 2830.0  # the first token of a passage
    metric = Metric((tokens.T @ tokens / 300,))
    codebook = KMeans(vector_length=2, share="layer", table="fp16", weight_power=0.0, iterations=10, sample=512, seed=0)
    found = {}
    for number in (0, 1):
        outliers = find_outliers(weight, metric, number) if number else None
        rest = weight if outliers is None else weight - outliers.dense()
        (problem,) = layer_problems([site], weights={site: rest}, metrics={site: metric}).values()
        found[number] = proxy(problem, outliers, codebook)
    assert found[0] > 0.5
    assert found[1] < 0.02
    assert found[1] < 0.05 * found[0]


def proxy(problem, outliers, codebook):
    problems = {problem.site: replace(problem, outliers=outliers)}
    cache = CodebookCache(cut_table_groups(problems, codebook), codebook, problems)
    (rate,) = [rate for rate in codebook.rates() if rate.index_bits == 2]
    rounded = LayerRounder(cache, [rate], Hessian(damping=0.01), None, {}).round([problem.site], [])
    return rounded.proxy[problem.site]["feedback"]
