"""The stress variant computes what the model computes, to the bit, and is what it claims: a spread of channel scales."""

import math
import sys

import pytest
import torch
from conftest import ROOT
from transformers import AutoConfig, AutoModelForImageTextToText

from mgvq.checkpoint.load import load as load_checkpoint
from mgvq.checkpoint.save import save
from mgvq.errors import UserError
from mgvq.evaluation.documents import documents
from mgvq.model.answers import answer_logits
from mgvq.model.encode import Example, encode
from mgvq.model.load import Loaded, load
from mgvq.model.sites import list_sites, site_weights
from mgvq.model.source import SHIPPED, Source, Stress
from mgvq.model.stress import find_pairs, inject
from mgvq.types import Batch

sys.path.append(str(ROOT / "experiments" / "train_tiny_vlms"))
from build import FAMILIES, build

STRESS = Stress(sigma=0.7, seed=0)


def questions(processor) -> Batch:
    return encode(processor, [Example(d["sample_id"], d["image"], d["question"], d["answer"]) for d in documents(0, 12)[::4]])


def kurtosis(values: torch.Tensor) -> float:
    centred = values.flatten() - values.mean()
    return float(centred.pow(4).mean() / centred.pow(2).mean() ** 2)


def recipe(name: str) -> tuple[Loaded, Batch]:
    """A family with random weights, norms and biases included, so that nothing is right because it is one or zero."""
    model, processor = build(name, 0)
    draws = torch.Generator().manual_seed(0)
    for parameter in model.eval().requires_grad_(False).parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draws))
    processor.tokenizer.padding_side = "left"
    return Loaded(model, processor, torch.bfloat16), questions(processor)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_the_same_to_the_bit(name: str) -> None:
    loaded, batch = recipe(name)
    model, before = loaded.model, answer_logits(loaded.model, batch)
    weights = {site: weight.clone() for site, weight in site_weights(model, list_sites(model, "language")).items()}
    pairs = inject(model, batch, STRESS)
    assert torch.equal(answer_logits(model, batch), before)
    # Per block: both norms, values against their output projection, the up against the down projection; all layers are touched.
    assert len(pairs) == 4 * 4
    assert sorted(len(p.readers) for p in pairs) == [1] * 8 + [2] * 4 + [3] * 4
    for site, weight in weights.items():
        assert not torch.equal(model.get_submodule(site.name).weight, weight)


def test_shipped_models_answer_alike_and_are_stressed(family: str) -> None:
    """Through `load`, and after storing in 16 bits as a checkpoint does."""
    plain, stressed = (
        load(Source(name=family, path=str(SHIPPED / family), revision=None, dtype="float32", stress=s), torch.device("cpu"))
        for s in (Stress(sigma=None, seed=0), STRESS)
    )
    batch = questions(plain.processor)
    assert torch.equal(answer_logits(stressed.model, batch), answer_logits(plain.model, batch))
    sites = [s for s in list_sites(plain.model, "language") if s.block is not None]
    for measured in (_channel_norms, _inputs):
        before, after = (torch.tensor([kurtosis(measured(m.model, batch, s.name)) for s in sites]) for m in (plain, stressed))
        assert after.median() > 1.5 * before.median()


def _channel_norms(model, batch: Batch, name: str) -> torch.Tensor:
    return model.get_submodule(name).weight.norm(dim=0)


def _inputs(model, batch: Batch, name: str) -> torch.Tensor:
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    answer_logits(model, batch)
    handle.remove()
    return seen[0]


def test_a_checkpoint_of_it_answers_like_one_of_the_plain_model(tmp_path) -> None:
    loaded, batch = recipe("tiny_internvl")
    save(tmp_path / "plain", loaded, [], {})
    inject(loaded.model, batch, STRESS)
    save(tmp_path / "stressed", loaded, [], {})
    plain, stressed = (answer_logits(load_checkpoint(tmp_path / name), batch) for name in ("plain", "stressed"))
    assert torch.equal(plain, stressed)


def test_seeds_and_layers_draw_their_own_scales() -> None:
    scales = []
    for stress in (STRESS, STRESS, Stress(sigma=0.7, seed=1)):
        loaded, batch = recipe("tiny_internvl")
        before = {name: p.clone() for name, p in loaded.model.named_parameters()}
        pairs = inject(loaded.model, batch, stress)
        found = [loaded.model.get_submodule(p.source).weight / before[f"{p.source}.weight"] for p in pairs if len(p.readers) > 1]
        scales.append(torch.stack(found))
    assert torch.equal(scales[0], scales[1])
    assert not torch.equal(scales[0], scales[2])
    assert len(set(map(tuple, scales[0].tolist()))) == len(scales[0])
    logs = scales[0].log2()
    assert torch.equal(logs, logs.round())
    # sigma of 0.7 in octaves, and a twelfth from rounding
    assert float(logs.var()) == pytest.approx((0.7 / math.log(2)) ** 2 + 1 / 12, rel=0.15)


def text_batch() -> Batch:
    ids = torch.tensor([[1, 7, 9, 8, 5]])
    mask = torch.tensor([[False, False, False, True, True]])
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ~ids.bool(), mask, ids.bool(), ("a",))


def llava(text: dict) -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", "patch_size": 14, "image_size": 28, "projection_dim": 32, **sizes}
    config = AutoConfig.for_model(
        "llava", vision_config=vision, text_config={"vocab_size": 64, **sizes, **text}, image_token_index=4, pad_token_id=0
    )
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)


def test_a_norm_that_adds_one_to_its_weight_is_an_error() -> None:
    model = llava({"model_type": "gemma", "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0})
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.add_(1)
    with pytest.raises(UserError, match=r"computes something else .* Scaled were: model\.language_model\.layers\.0\.input_"):
        inject(model, text_batch(), STRESS)


def test_without_a_norm_that_linear_layers_read_it_says_what_there_is() -> None:
    model = llava({"model_type": "llama", "num_key_value_heads": 1, "pad_token_id": 0})
    for block in model.model.language_model.layers:
        for layer in (m for m in block.modules() if isinstance(m, torch.nn.Linear)):
            layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    with pytest.raises(UserError, match=r"no norm is read.*Norms there: input_layernorm, post_attention_layernorm; .*down_proj"):
        find_pairs(model, text_batch())
