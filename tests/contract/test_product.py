"""Compensation, codebook and allocation, each with each of the others, through `quantize`, on a language model of two blocks."""

import dataclasses
import functools
import itertools

import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from transformers import LlamaConfig, LlamaForCausalLM

from mgvq.curvature.statistics import collect
from mgvq.errors import UserError
from mgvq.model.sites import site_weights
from mgvq.quantization.blockwise import Samples
from mgvq.quantization.method import Method
from mgvq.quantization.pipeline import quantize
from mgvq.refit.closed_form import ClosedForm
from mgvq.runs.build import build
from mgvq.runs.places import conf_folder
from mgvq.types import Batch, Needs, Site

BITS = 4.0
MORE = {  # settings that the small layers, or the time, ask for
    "codebook": {name: ["codebook.iterations=2"] for name in ("columns", "kmeans", "product", "residual")},
    "allocation": {"uniform": ["allocation.spread=true", "allocation.tolerance=0.1"], "transfer": None},
    "compensation": {"gradient_hessian": ["compensation.steps=[0.0,0.1]"]},
}


def variants(group: str) -> list[str]:
    names = (f.stem for f in (ROOT / "conf" / group).glob("*.yaml"))
    return sorted(name for name in names if MORE[group].get(name, ()) is not None and (group, name) not in NOTHING)


NOTHING = {("codebook", "none"), ("allocation", "none")}


@functools.cache
def built(group: str, name: str):
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return build(compose("config", [f"{group}={name}", *MORE[group].get(name, ())]), group)


@functools.cache
def parts():
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("config", ["curvature=kronecker", "sensitivity=wanda", "grouping=score", "grouping.num_groups=2"])
        return {group: build(cfg, group) for group in ("curvature", "sensitivity", "grouping")}


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
    return model, sites, collect(model, sites, batches, Needs(gram=True, gradients=True), 0), Samples(batches, heldout)


def batch(model, seed: int) -> Batch:
    ids = torch.randint(model.config.vocab_size, (6, 10), generator=torch.Generator().manual_seed(seed))
    inputs, everywhere = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.ones_like(ids, dtype=torch.bool)
    answers = everywhere & (torch.arange(10) >= 5)
    return Batch(inputs, ~everywhere, answers, everywhere, tuple(f"{seed}-{row}" for row in range(6)))


def in_pairs() -> list[tuple[str, str, str]]:
    """(codebook, allocation, compensation), every two of any two groups together somewhere: the allocations in turn, one further
    in each row."""
    codebooks, allocations, compensations = map(variants, ("codebook", "allocation", "compensation"))
    return [
        (codebook, allocations[(row + column) % len(allocations)], compensation)
        for row, compensation in enumerate(compensations)
        for column, codebook in enumerate(codebooks)
    ]


def test_every_pair_is_tried() -> None:
    groups = [variants(group) for group in ("codebook", "allocation", "compensation")]
    for a, b in itertools.combinations(range(3), 2):
        assert {(row[a], row[b]) for row in in_pairs()} == set(itertools.product(groups[a], groups[b]))


@pytest.mark.parametrize(("codebook", "allocation", "compensation"), in_pairs())
def test_the_layers_come_back_in_the_bits_that_were_predicted(problem, codebook: str, allocation: str, compensation: str) -> None:
    model, sites, bank, samples = problem
    chosen = {"codebook": codebook, "allocation": allocation, "compensation": compensation}
    stages = {**parts(), **{group: built(group, name) for group, name in chosen.items()}}
    if stages["codebook"].spans_rows and stages["compensation"].corrects_rows:
        with pytest.raises(UserError, match="several rows at once"):
            Method(**stages)
        return
    method = Method(**stages)
    before = {s: w.clone() for s, w in site_weights(model, sites).items()}
    if refits := method.codebook.can_be_refitted:
        method = dataclasses.replace(method, refit=ClosedForm(rounds=2))
    report = quantize(model, sites, bank, method, BITS, samples)
    assert list(report.weights) == sites
    assert all(torch.equal(w, before[s]) for s, w in site_weights(model, sites).items()), "the model itself stays as it is"
    stored = {id(t): t for w in report.weights.values() for t in w.tensors().values()}
    assert sum(8 * t.nbytes for t in stored.values()) == report.stored_bits
    tolerance = 0.1 if allocation == "uniform" else 0.0
    assert report.stored_bits <= (1 + tolerance) * BITS * sum(s.num_weights for s in sites)
    for site, weight in report.weights.items():
        assert (weight.decode() - before[site]).norm() < 3 * before[site].norm()
    found = report.proxy.pivot_table(index="site", columns="part", values="proxy_error")
    assert len(found) == len(sites)
    assert ("refit" in found) == refits
