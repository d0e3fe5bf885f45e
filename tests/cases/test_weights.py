"""Odd weights: NaN, constants, and layers far outside the range of fp16. A new input is a line in a table."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from variants import built, each

from mgvq.curvature.statistics import collect
from mgvq.errors import UserError
from mgvq.model.sites import site_weights
from mgvq.quantization.method import Method
from mgvq.quantization.pipeline import quantize
from mgvq.quantization.preflight import constant_layers
from mgvq.quantization.subject import Samples
from mgvq.types import Batch, Needs, Site

CODEBOOKS = each("codebook")
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
NAMES = ["model.layers.0.self_attn.o_proj", UP, DOWN]
NEEDS = Needs(gram=True, fisher=True, saliency=True, gradient=True)


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    config = LlamaConfig(**sizes, vocab_size=32, initializer_range=0.3)
    return LlamaForCausalLM(config).requires_grad_(False)


def sites_of(model: LlamaForCausalLM) -> list[Site]:
    kinds = {name: name.rsplit(".", 1)[1] for name in NAMES}
    return [Site(name, "language", kind, 0, *model.get_submodule(name).weight.shape) for name, kind in kinds.items()]


def batch(seed: int = 1) -> Batch:
    ids = torch.randint(32, (6, 10), generator=torch.Generator().manual_seed(seed))
    inputs, everywhere = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.ones_like(ids, dtype=torch.bool)
    answers = everywhere & (torch.arange(10) >= 5)
    return Batch(inputs, ~everywhere, answers, everywhere, tuple(f"{seed}-{row}" for row in range(6)))


def method(codebook: str = "kmeans", **stages) -> Method:
    chosen = {
        "curvature": built("curvature", "kronecker"),
        "sensitivity": built("sensitivity", "obs"),
        "grouping": built("grouping", "one"),
        "allocation": built("allocation", "water_filling"),
        "codebook": CODEBOOKS[codebook],
        "compensation": built("compensation", "hessian"),
    }
    chosen |= stages
    if chosen["codebook"].can_be_refitted:
        chosen["refit"] = built("refit", "closed_form")
    return Method(**chosen)


def quantized(model: LlamaForCausalLM, chosen: Method):
    sites = sites_of(model)
    bank = collect(model, sites, [batch()], NEEDS, 0)
    return quantize(model, sites, bank, chosen, 6.0, Samples([batch(1)], [batch(2)]))


@pytest.mark.parametrize("power", [22, -22, 40])
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_the_same_function_at_another_scale_is_quantised_the_same(codebook: str, power: int) -> None:
    """up_proj times 2^-p and down_proj times 2^p: the output, and what the quantised layers make of it, stays."""
    plain, scaled = small_model(), small_model()
    for name, exponent in ((UP, -power), (DOWN, power)):
        scaled.get_submodule(name).weight.mul_(2.0**exponent)
    stages = dict(grouping=built("grouping", "score", "num_groups=2")) if codebook == "kmeans" else {}
    first, second = (quantized(model, method(codebook, **stages)) for model in (plain, scaled))
    assert first.stored_bits == second.stored_bits
    answers = []
    for model, report in ((plain, first), (scaled, second)):
        for site, stored in report.weights.items():
            model.get_submodule(site.name).weight.copy_(stored.decode())
        answers.append(model(**batch(3).inputs).logits)
    assert answers[0].isfinite().all()
    torch.testing.assert_close(answers[1], answers[0], rtol=0.02, atol=0.02 * answers[0].abs().max().item())


def test_the_scale_of_ordinary_layers_is_left_alone() -> None:
    report = quantized(small_model(), method())
    assert {stored.format for stored in report.weights.values()} == {"vector"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        ("model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.o_proj"),
        ("model.layers.0.mlp.gate_proj.weight", DOWN),
        ("lm_head.weight", "answers of the calibration sample 1-0"),
    ],
)
def test_values_that_are_not_finite_are_named_by_the_layer_that_reads_them(tensor: str, named: str, value: float) -> None:
    model = small_model()
    model.get_parameter(tensor)[3, 2] = value
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        collect(model, sites_of(model), [batch()], NEEDS, 0)


@pytest.mark.parametrize("part", [(slice(None), slice(None)), (2, slice(None)), (slice(None), 3)], ids=["layer", "row", "column"])
@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_a_constant_layer_row_or_column_is_flagged_and_quantised(part, value: float) -> None:
    model = small_model()
    model.get_submodule(UP).weight[part] = value
    report = quantized(model, method())
    assert f"constant:{UP}" in report.flags
    assert not any(flag.startswith(f"constant:{name}") for name in NAMES if name != UP for flag in report.flags)
    assert all(stored.decode().isfinite().all() for stored in report.weights.values())


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1)], ids=str)  # every row, or every column, is of a single weight
def test_single_weights_are_no_constants(shape: tuple[int, int]) -> None:
    site = Site("x", "language", "x", None, *shape)
    assert not constant_layers({site: torch.arange(shape[0] * shape[1]).view(shape).float()})


def test_shipped_models_have_no_constant_layers(loaded) -> None:
    from mgvq.model.sites import list_sites

    assert not constant_layers(site_weights(loaded.model, list_sites(loaded.model, "all")))
