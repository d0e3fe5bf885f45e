"""What the papers of peers report of them, on cases that suit them."""

from dataclasses import replace

import torch
from conftest import layer_problems
from textbook import (
    LDLQ_ALONE,
    SAMPLES,
    SMALL_TILES,
    TOKENS,
    cost,
    layer,
    loud,
    normal,
    one,
    preset,
    quiet_images,
    weighted_moment,
)

from mgvq.allocation.uniform import Uniform
from mgvq.quantization.codebooks import CodebookCache, rate_table
from mgvq.quantization.table_groups import cut_table_groups
from mgvq.types import Site


def total(objective, *methods, make=layer, seeds=range(0, 800, 100)):
    """Summed over layers: the objective of each method's error."""
    items = [make(seed, num_out=32) for seed in seeds]
    return [sum(objective(one(m, i) - i.weight.double(), i) for i in items) for m in methods]


def output_error(error, item):
    return cost(error, item.moment())


def text_error(error, item):
    text = item.x[:, TOKENS // 2 :].double().flatten(0, 1)
    return cost(error, text.T @ text / len(text)) / cost(item.weight.double(), text.T @ text / len(text))


def guided_error(error, item):
    runs = zip(error.chunk(4), item.all_g.square().chunk(4, 1), strict=True)
    return sum(cost(rows, weighted_moment(item.all_x, g.mean(1))) for rows, g in runs)


def kronecker_error(error, item):
    gradients = [g.T @ x for g, x in zip(item.g.double(), item.x.double(), strict=True)]
    h_out, h_in = sum(G @ G.T for G in gradients), sum(G.T @ G for G in gradients)
    return float((h_out @ error @ h_in * error).sum())


def test_gptq_beats_rtn_and_foem_lies_between():
    """On one grid for all three."""
    plain = [preset(f"method={m}", "codebook.weighted=false") for m in ("rtn", "foem", "gptq")]
    rtn, foem, gptq = total(output_error, *plain)
    assert gptq < 0.8 * rtn
    assert gptq < foem < rtn


def test_awq_beats_rtn_where_few_channels_are_loud():
    rtn, awq = total(output_error, preset("method=rtn"), preset("method=awq"), make=lambda *a, **k: loud(layer(*a, **k)))
    assert awq < 0.8 * rtn


def test_mbq_serves_the_text_that_awq_gives_up_for_images():
    awq, mbq = total(text_error, preset("method=awq"), preset("method=mbq"), make=lambda *a, **k: quiet_images(layer(*a, **k)))
    assert mbq < 0.95 * awq


def test_vlmq_serves_the_text_that_gptq_gives_up_for_images():
    gptq, vlmq = total(
        text_error, preset("method=gptq"), preset("method=vlmq"), make=lambda *a, **k: quiet_images(layer(*a, **k))
    )
    assert vlmq < 0.95 * gptq


def test_second_order_beats_nearest_with_both_directions_of_vectors():
    for method in ("gptvq", "vptq"):
        with_feedback, nearest = total(output_error, preset(f"method={method}"), preset(f"method={method}", *NEAREST[method]))
        assert with_feedback < 0.9 * nearest


NEAREST = {
    "gptvq": ["compensation=none", "~compensation.damping", "~compensation.tables", "sensitivity=uniform"],
    "vptq": ["compensation=none", "~compensation.damping", "sensitivity=uniform"],
}


def test_guidedquant_lowers_the_guided_objective_of_ldlq():
    ldlq, guided = total(
        guided_error,
        preset("method=guidedquant", *LDLQ_ALONE, "curvature=input"),
        preset("method=guidedquant", *LDLQ_ALONE),
        make=uneven_gradients,
    )
    assert guided < 0.95 * ldlq


def uneven_gradients(seed, num_out):
    """Every fourth of the rows hears other tokens."""
    item = layer(seed, num_out=num_out)
    ear = (normal(4, SAMPLES, TOKENS, seed=seed + 5) * 1.5).exp().repeat_interleave(num_out // 4, 0).permute(1, 2, 0)
    return replace(item, g=item.g * ear)


def test_yaqa_lowers_the_kronecker_objective_of_ldlq():
    ldlq, yaqa = total(
        kronecker_error,
        preset("method=yaqa", *SMALL_TILES[:4], "compensation=hessian", "~compensation.output_damping"),
        preset("method=yaqa", *SMALL_TILES),
    )
    assert yaqa < 0.9 * ldlq


def test_rsavq_mixed_bits_lose_less_than_uniform_ones_at_equal_bytes():
    """Channel energies over a factor of 1000: predicted loss of the allocation, on tables that are fitted."""
    method, generator = preset("method=rsavq"), torch.Generator().manual_seed(0)
    sites = [Site(f"l{i}", "language", "up_proj", i, 128, 64) for i in range(6)]
    weights = {s: torch.randn(128, 64, generator=generator) for s in sites}
    scores = {s: (2.5 * torch.randn(64, generator=generator)).exp() for s in sites}
    problems = layer_problems(sites, weights=weights, scores=scores, groups=method.grouping(scores, {}))
    table_groups = cut_table_groups(problems, method.codebook)
    table = rate_table(CodebookCache(table_groups, replace(method.codebook, iterations=4, sample=32), problems), "measured")
    budget, index = int(2.6 * 6 * 128 * 64), torch.arange(len(table_groups))
    mixed, uniform = (rule(table, budget) for rule in (method.allocation, Uniform(tolerance=0.0, spread=True)))
    assert table.bits[index, mixed].sum() <= budget
    assert table.loss[index, mixed].sum() < 0.8 * table.loss[index, uniform].sum()
