"""Compensation, codebook and allocation, each with each of the others, through `quantize`, on a language model of two blocks."""

import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from variants import built, variants

from mgvq.curvature.statistics import collect
from mgvq.model.sites import site_weights
from mgvq.quantization.method import Method
from mgvq.quantization.pipeline import quantize
from mgvq.quantization.subject import Samples
from mgvq.refit.closed_form import ClosedForm
from mgvq.types import Batch, Needs, Site

BITS = 4.0
MORE = {  # settings that the small layers, or the time, ask for
    ("codebook", "scaled_grid"): ("num_exponents=3",),
    ("allocation", "uniform"): ("spread=true", "tolerance=0.1"),
    ("compensation", "gradient_hessian"): ("steps=[0.0,0.1]",),
}


def variant(group: str, name: str):
    return built(group, name, *MORE.get((group, name), ()))


def others():
    """The stages that stay the same."""
    return {
        "curvature": built("curvature", "kronecker"),
        "sensitivity": built("sensitivity", "wanda"),
        "grouping": built("grouping", "score", "num_groups=2"),
    }


@pytest.fixture(scope="module")
def problem():
    """Two layers of one block and one of the next, their statistics, and samples for gradients and for choosing."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32, initializer_range=0.3)).requires_grad_(False)
    names = [(0, "self_attn.v_proj"), (0, "mlp.down_proj"), (1, "self_attn.v_proj")]
    layers = {f"model.layers.{block}.{name}": block for block, name in names}
    sites = [
        Site(name, "language", name.rsplit(".", 1)[1], block, *model.get_submodule(name).weight.shape)
        for name, block in layers.items()
    ]
    batches, heldout = [batch(model, 1)], [batch(model, 2)]
    return (
        model,
        sites,
        collect(model, sites, batches, Needs(gram=True, fisher=True, saliency=True, gradient=True), 0),
        Samples(batches, heldout),
    )


def batch(model, seed: int) -> Batch:
    ids = torch.randint(model.config.vocab_size, (6, 10), generator=torch.Generator().manual_seed(seed))
    inputs, everywhere = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.ones_like(ids, dtype=torch.bool)
    answers = everywhere & (torch.arange(10) >= 5)
    return Batch(inputs, ~everywhere, answers, everywhere, tuple(f"{seed}-{row}" for row in range(6)))


def in_pairs() -> list[tuple[str, str, str]]:
    """(codebook, allocation, compensation), so that every two of any two groups meet somewhere.

    The columns are the codebooks. In each row the compensations go one further, and so do the allocations from column to column.
    """
    codebooks, allocations, compensations = map(variants, ("codebook", "allocation", "compensation"))
    rows = range(max(len(allocations), len(compensations)))
    pairs = [
        (codebook, allocations[(row + column) % len(allocations)], compensations[row % len(compensations)])
        for row in rows
        for column, codebook in enumerate(codebooks)
    ]
    met = {(allocation, compensation) for _, allocation, compensation in pairs}
    missing = sorted(set(itertools.product(allocations, compensations)) - met)  # where there are fewer codebooks than allocations
    return pairs + [(codebooks[i % len(codebooks)], *both) for i, both in enumerate(missing)]


def test_every_pair_is_tried() -> None:
    groups = [variants(group) for group in ("codebook", "allocation", "compensation")]
    for a, b in itertools.combinations(range(3), 2):
        assert {(row[a], row[b]) for row in in_pairs()} == set(itertools.product(groups[a], groups[b]))


@pytest.mark.parametrize(("codebook", "allocation", "compensation"), in_pairs())
def test_the_layers_come_back_in_the_bits_that_were_predicted(problem, codebook: str, allocation: str, compensation: str) -> None:
    model, sites, bank, samples = problem
    chosen = {"codebook": codebook, "allocation": allocation, "compensation": compensation}
    stages = {**others(), **{group: variant(group, name) for group, name in chosen.items()}}
    refits = stages["codebook"].can_be_refitted
    stages["refit"] = ClosedForm(damping=0.0, rounds=2) if refits else None
    if not (refits or stages["codebook"].needs_importance or stages["compensation"].needs_metric):
        stages["curvature"] = None  # nothing would look at it
    method = Method(**stages)
    before = {s: w.clone() for s, w in site_weights(model, sites).items()}
    report = quantize(model, sites, bank, method, BITS, samples)
    assert list(report.weights) == sites
    assert all(torch.equal(w, before[s]) for s, w in site_weights(model, sites).items()), "the model itself stays as it is"
    stored = {id(t): t for w in report.weights.values() for t in w.tensors().values()}
    assert sum(8 * t.nbytes for t in stored.values()) == report.stored_bits
    bits = dict(zip(report.layers.site, report.layers.bits, strict=True))
    assert sum(bits[s.name] * s.num_weights for s in sites) == pytest.approx(report.stored_bits)
    assert (report.layers.times_limit > 0).all()
    tolerance = 0.1 if allocation == "uniform" else 0.0
    assert report.stored_bits <= (1 + tolerance) * BITS * sum(s.num_weights for s in sites)
    for site, weight in report.weights.items():
        assert (weight.decode() - before[site]).norm() < 3 * before[site].norm()
    if method.curvature is None:
        assert report.proxy.empty, "errors are measured in the metric"
        return
    found = report.proxy.pivot_table(index="site", columns="part", values="proxy_error")
    assert len(found) == len(sites)
    assert ("refit" in found) == refits
