"""The block walk against plain passes with hooks, on the shipped models."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mgvq.calibration.tiny_vqa import TinyVQA
from mgvq.curvature.statistics import collect
from mgvq.model.answers import answer_states
from mgvq.model.blocks import block_name, by_block
from mgvq.model.encode import batches
from mgvq.model.sites import linear, list_sites, site_weights
from mgvq.model.walk import BlockWalk
from mgvq.model.weights import InModel
from mgvq.types import Batch, Needs


def noise(weight, seed):
    return 0.2 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def plain_pass(model, batch, names):
    """The inputs and outputs of modules in a whole pass, call by call."""
    seen = {name: [] for name in names}

    def hook(name):
        def record(_module, args, kwargs, output):
            hidden = args[0] if args else kwargs["hidden_states"]
            seen[name].append((hidden.clone(), (output if isinstance(output, torch.Tensor) else output[0]).clone()))

        return record

    handles = [model.get_submodule(n).register_forward_hook(hook(n), with_kwargs=True) for n in names]
    answer_states(model, batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("scope", ["language", "all"])
def test_a_walk_sees_what_whole_passes_see(loaded, scope: str) -> None:
    """Under both prefixes, block after block, in two walks one after the other."""
    model, sites = loaded.model, list_sites(loaded.model, scope)
    drawn = TinyVQA(num_images=2, questions_per_image=2, heldout_images=1, shown="both", seed=0, label_seed=0).draw()
    samples = list(batches(loaded.processor, drawn.examples, 2))
    blocks, originals = list(by_block(sites)), {s: w.clone() for s, w in site_weights(model, sites).items()}
    names = [block_name(block) for block in blocks]
    full = [plain_pass(model, batch, names) for batch in samples]
    walk = BlockWalk(model, sites, samples)
    with InModel(model).unchanged(list(originals)):
        for seed in (0, 1):
            walk.unsettle()
            for block, name in zip(blocks, names, strict=True):
                visit = walk.visit(block, {site: originals[site] for site in block})
                now = [plain_pass(model, batch, [name]) for batch in samples]
                for prefix, expected in (("full_precision", full), ("quantized", now)):
                    found = list(visit.run(prefix))
                    pairs = [(n, *one) for n, seen in enumerate(expected) for one in seen[name]]
                    assert len(found) == len(pairs)
                    for one, (number, hidden, output) in zip(found, pairs, strict=True):
                        assert one.call.number == number
                        torch.testing.assert_close(one.call.hidden, hidden, rtol=0, atol=0)
                        torch.testing.assert_close(one.output, output, rtol=0, atol=0)
                for site in block:
                    weight = linear(model, site).weight
                    weight.data.add_(noise(weight, seed))
                walk.settle(block)


def test_inputs_inside_a_block_and_a_backward_pass_from_its_output(loaded) -> None:
    model = loaded.model
    sites = list_sites(model, "language")
    drawn = TinyVQA(num_images=2, questions_per_image=1, heldout_images=1, shown="both", seed=0, label_seed=0).draw()
    samples = list(batches(loaded.processor, drawn.examples, 2))
    block = next(iter(by_block(sites)))
    visit = BlockWalk(model, sites, samples).visit(block, {s: linear(model, s).weight.detach().clone() for s in block})
    (name,) = [s.name.removeprefix(visit.name + ".") for s in block if s.kind == "down_proj"]
    weight = visit.module.get_submodule(name).weight
    (one,) = visit.run("quantized", [name])
    weight.requires_grad_()
    try:
        (again,) = visit.run("quantized", [name], graph=True)
        (gradient,) = torch.autograd.grad(again.output.square().sum() / 2, weight)
    finally:
        weight.requires_grad_(False)
    torch.testing.assert_close(again.output.detach(), one.output)
    # In all four families the block's output is its down projection's added to the stream.
    expected = one.output.flatten(0, -2).T @ one.inputs[name].flatten(0, -2)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def llava():
    """A model whose projector reads what the last vision block but one puts out, and a batch for it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=28, patch_size=14)
    text = LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2, vocab_size=64)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=63, vision_feature_layer=-2, image_seq_length=4
    )
    ids = torch.tensor([[1, 63, 63, 63, 63, *range(5, 12)]])
    masks = {"image_mask": ids == 63, "loss_mask": torch.arange(12)[None] > 8, "valid_mask": ids > 0}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 28, 28)}
    return LlavaForConditionalGeneration(config).eval().requires_grad_(False), Batch(inputs, **masks, sample_ids=("one",))


def test_a_settled_block_plays_its_own_output_where_more_than_the_next_one_reads_it() -> None:
    model, batch = llava()
    sites = list_sites(model, "all")
    with torch.no_grad():
        expected, walk = answer_states(model, batch), BlockWalk(model, sites, [batch])
        for block in by_block(sites):
            walk.settle(block)
            for _ in range(2):  # the first pass computes and keeps, the second one plays
                with walk.passing(0) as samples:
                    assert torch.equal(answer_states(model, samples), expected), block_name(block)


def test_a_block_that_nobody_reads_has_no_gradient() -> None:
    model, batch = llava()
    last = [block for block in by_block(list_sites(model, "all")) if block[0].tower == "vision"][-1]
    found = collect(model, last, [batch], Needs(gradient=True), 0)
    assert all(not found[site].gradient.any() for site in last)
