"""Rounding behind the quantised prefix against plain passes and explicit regressions, on the shipped models."""

from contextlib import contextmanager

import pytest
import torch
from conftest import layer_problems
from transformers import LlamaConfig, LlamaForCausalLM
from variants import built

from mgvq.calibration.tiny_vqa import TinyVQA
from mgvq.codebook.scalar import Scalar
from mgvq.compensation.none import NoCompensation
from mgvq.errors import UserError
from mgvq.model.answers import answer_states
from mgvq.model.blocks import by_block, install
from mgvq.model.encode import batches
from mgvq.model.sites import linear, list_sites, site_weights
from mgvq.model.walk import BlockWalk
from mgvq.model.weights import InModel
from mgvq.prefix.quantized import QuantizedPrefix
from mgvq.quantization.codebooks import CodebookCache
from mgvq.quantization.rounding import LayerRounder
from mgvq.quantization.sequential import _Streams, sequential_rounding
from mgvq.quantization.subject import Samples, Subject
from mgvq.quantization.table_groups import cut_table_groups
from mgvq.runs import quantise
from mgvq.types import Batch, Metric


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prefix(**settings):
    return QuantizedPrefix(**(dict(residual=True, asymmetric=True, ridge=[0.1]) | settings))


def moments(lacking, inputs):
    return (lacking.T @ inputs / len(inputs)).float(), (inputs.T @ inputs / len(inputs)).float()


@pytest.mark.parametrize("of", ["stream", "output"])
def test_the_correction_is_the_ridge_regression_of_what_is_lacking(of) -> None:
    inputs, lacking = normal(200, 6), normal(200, 4, seed=1)
    found = prefix(ridge=[0.3]).correction(of, *moments(lacking, inputs), None)
    ridge = 0.3 * float((inputs.T @ inputs / 200).diagonal().mean())
    stacked = torch.cat([inputs, (200 * ridge) ** 0.5 * torch.eye(6, dtype=torch.float64)])  # ridge as rows of a least squares
    expected = torch.linalg.lstsq(stacked, torch.cat([lacking, torch.zeros(6, 4, dtype=torch.float64)])).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_ridge_is_the_best_on_held_out_samples() -> None:
    """Few samples of pure noise want the largest ridge, many of a linear truth the smallest."""
    truth, ridges = normal(4, 6, seed=2), [0.01, 1.0, 100.0]
    for number, noise, best in ((10, 30.0, 100.0), (5000, 0.01, 0.01)):
        draw = [normal(number, 6, seed=3), normal(5000, 6, seed=4)]
        lacking = [x @ truth.T + noise * normal(len(x), 4, seed=5 + s) for s, x in enumerate(draw)]
        calibration, heldout = (moments(r, x) for r, x in zip(lacking, draw, strict=True))
        chosen = prefix(ridge=ridges).correction("stream", *calibration, heldout)
        assert torch.equal(chosen, prefix(ridge=[best]).correction("stream", *calibration, None))


def test_each_kind_of_layer_can_be_left_alone() -> None:
    both = moments(normal(20, 4, seed=1), normal(20, 6))
    assert prefix(residual=False).correction("stream", *both, None) is None
    assert prefix(asymmetric=False).correction("output", *both, None) is None
    with pytest.raises(UserError, match="ridge must be a list of numbers > 0"):
        prefix(ridge=[0.0])


def samples(loaded, images=2):
    drawn = TinyVQA(num_images=images, questions_per_image=2, heldout_images=1, shown="both", seed=0, label_seed=0).draw()
    return Samples(*(list(batches(loaded.processor, part, 2)) for part in (drawn.examples, drawn.heldout_examples)))


def test_the_moments_behind_the_prefix_are_of_the_further_samples_too(loaded) -> None:
    """Packed or not; where gradients are taken block by block the samples are those of the gradients alone."""
    settings = dict(num_images=1, questions_per_image=2, heldout_images=1, seed=0, label_seed=0)
    for shown in ("both", "text"):
        drawn = TinyVQA(**settings, shown=shown, gram_samples=3).draw()
        own, heldout, further = (
            {e.sample_id for e in part} for part in (drawn.examples, drawn.heldout_examples, drawn.gram_examples)
        )
        assert [len(part) for part in (own, heldout, further)] == [2, 2, 4]
        for for_grams, expected in ((True, own | further), (False, own)):
            made = quantise.samples_as_batches(loaded, drawn, for_grams=for_grams)
            found = [[i for batch in part for i in batch.sample_ids] for part in (made.batches, made.heldout)]
            assert [len(part) for part in found] == [len(expected), 2]
            assert (set(found[0]), set(found[1])) == (expected, heldout)


@contextmanager
def disturbed(model, block, size=0.3):
    """The model with noise on the weights of one block, and what they were."""
    originals = {s: w.clone() for s, w in site_weights(model, list_sites(model, "all")).items()}
    with InModel(model).unchanged(list(originals)):
        moved = {s: originals[s] + size * originals[s].std() * normal(*originals[s].shape, seed=9).float() for s in block}
        install(model, moved)
        yield originals


def test_the_stream_is_found_behind_the_layers_that_are_added_to_it(loaded) -> None:
    sites = list_sites(loaded.model, "language")
    originals = site_weights(loaded.model, sites)
    walk = BlockWalk(loaded.model, sites, samples(loaded).batches)
    for block in by_block(sites):
        streams = _Streams(walk, block, originals)
        assert {site.kind for site in streams.places} == {"o_proj", "down_proj"}
        walk.settle(block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_stream_is_found_in_every_precision(dtype: torch.dtype) -> None:
    """Its sums are rounded to the model's dtype."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=64)).eval().requires_grad_(False).to(dtype)
    ids = torch.randint(2, 60, (2, 24))
    none, last = torch.zeros_like(ids, dtype=torch.bool), torch.arange(24).expand(2, 24) > 19
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, none, last, ~none, ("a", "b"))
    sites = list_sites(model, "language")
    block = next(by_block(sites))
    streams = _Streams(BlockWalk(model, sites, [batch]), block, site_weights(model, sites))
    assert {site.kind for site in streams.places} == {"o_proj", "down_proj"}


def test_moments_are_those_of_plain_passes_of_both_models(loaded) -> None:
    """The second block behind a disturbed first one: input and output of `gate_proj`, and the stream about `down_proj`."""
    model = loaded.model
    sites = list_sites(model, "language")
    first, second = list(by_block(sites))[:2]
    batch = samples(loaded).batches[0]
    (gate,), (down,) = ([s for s in second if s.kind == kind] for kind in ("gate_proj", "down_proj"))
    block = model.get_submodule(gate.name.rsplit(".", 2)[0])

    def plain():
        seen = {}
        hooks = [
            linear(model, s).register_forward_hook(lambda m, a, o, k=s.kind: seen.update({k: (a[0], o)})) for s in (gate, down)
        ]
        hooks.append(block.register_forward_hook(lambda m, a, o: seen.update(block=o if isinstance(o, torch.Tensor) else o[0])))
        with torch.inference_mode():
            answer_states(model, batch)
        for hook in hooks:
            hook.remove()
        keep = batch.valid_mask
        return {k: tuple(t[keep] for t in v) if isinstance(v, tuple) else v[keep] for k, v in seen.items()}

    full = plain()
    walk = BlockWalk(model, sites, [batch])
    with disturbed(model, first) as originals:
        present = plain()
        list(walk.visit(first, {s: originals[s] for s in first}).run("full_precision"))
        walk.settle(first)
        found = {**(streams := _Streams(walk, second, originals)).moments([gate]), **streams.moments([down])}
    x, number = present["gate_proj"][0], int(batch.valid_mask.sum())
    torch.testing.assert_close(found[gate].gram, x.T @ x / number, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        found[gate].lacking.float(), (full["gate_proj"][1] - present["gate_proj"][1]).T @ x / number, rtol=1e-3, atol=1e-4
    )
    x, output = present["down_proj"]
    lack = full["block"] - (present["block"] - output) - output
    torch.testing.assert_close(found[down].lacking.float(), lack.T @ x / number, rtol=1e-3, atol=1e-4)
    assert (found[gate].of, found[down].of) == ("output", "stream")


def rounded(loaded, shifts, scope="language"):
    """The model's weights after 3-bit rounding behind the quantised prefix."""
    model, sites = loaded.model, list_sites(loaded.model, scope)
    weights = {s: w.clone() for s, w in site_weights(model, sites).items()}
    metrics = {s: Metric((torch.eye(s.in_features),)) for s in sites}
    codebook = Scalar(group_size=None, clip="min_max")
    problems = layer_problems(sites, weights=weights, metrics=metrics)
    cache = CodebookCache(cut_table_groups(problems, codebook), codebook, problems)
    rates = [codebook.rates()[2]] * len(cache.table_groups)
    rounder = LayerRounder(cache, rates, NoCompensation(), None, {})
    return sequential_rounding(Subject(model, sites, samples(loaded, 4)), shifts, rounder, [])


def test_the_model_is_left_as_it_was_and_each_kind_of_shift_brings_it_nearer(loaded) -> None:
    model, sites = loaded.model, list_sites(loaded.model, "all")
    before = {s: w.clone() for s, w in site_weights(model, sites).items()}
    part = samples(loaded, 4)

    def drift(found):
        with InModel(model).unchanged(list(before)), torch.inference_mode():
            teacher = [answer_states(model, b) for b in part.batches]
            install(model, found.decoded)
            return sum(float((answer_states(model, b) - t).square().sum()) for b, t in zip(part.batches, teacher, strict=True))

    none, stream, both = (
        drift(rounded(loaded, prefix(residual=r, asymmetric=a, ridge=[1.0])))
        for r, a in ((False, False), (True, False), (True, True))
    )
    assert all(torch.equal(w, before[s]) for s, w in site_weights(model, sites).items())
    assert stream < none
    assert both < none


def test_all_parts_of_a_model_are_rounded(loaded) -> None:
    """Vision tower and projector too, where layers stand alone and blocks are called with other shapes."""
    found = rounded(loaded, built("prefix", "quantized"), scope="all")
    assert set(found.stored) == set(list_sites(loaded.model, "all"))
    assert all(values.isfinite().all() for values in found.decoded.values())
