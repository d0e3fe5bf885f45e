"""Embedding and head on a grid a row: from the model to a checkpoint and back, tied and not, packed and not."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mgvq
from mgvq.checkpoint.check import check_same_model
from mgvq.checkpoint.save import save
from mgvq.errors import UserError
from mgvq.model.load import Loaded
from mgvq.quantization.embeddings import embedding_storage_bits, embeddings, round_embeddings


def text_model(tied):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 37}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).eval().requires_grad_(False)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_every_row_is_within_half_a_step_of_its_grid(tied, bits):
    model = text_model(tied)
    assert list(embeddings(model)) == (["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"])
    rounded = round_embeddings(model, bits)
    for name, stored in rounded.items():
        weight = model.get_parameter(f"{name}.weight")
        step = stored.scales.float()
        assert step.shape == (37, 1)
        inside = (stored.codes > 0) & (stored.codes < 2**bits - 1)  # what is clipped lies further away
        error = (stored.decode() - weight).abs()
        assert (error <= 0.51 * step)[inside].all()
        assert float(error.square().mean()) < 0.02 / (1 if bits == 4 else 100) * float(weight.square().mean())
    sizes = [t.nbytes for stored in rounded.values() for t in stored.tensors().values()]
    assert embedding_storage_bits(model, bits) == 8 * sum(sizes)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_checkpoint_holds_them_packed_and_gives_them_back(loaded, bits, tmp_path):
    """Of every shipped family: counted in the model's bits, outside of the scope; the loaded-back check sees them in place."""
    before = {name: parameter.clone() for name, parameter in loaded.model.named_parameters()}
    rounded = round_embeddings(loaded.model, bits)
    ledger = save(tmp_path / "checkpoint", loaded, [], {}, rounded)
    entries = {e.tensor: e for e in ledger.entries}
    for name, stored in rounded.items():
        assert f"{name}.weight" not in entries
        assert entries[f"{name}.codes"].num_weights == before[f"{name}.weight"].numel()
        assert not entries[f"{name}.codes"].quantized
        assert sum(entries[f"{name}.{role}"].num_bytes for role in stored.tensors()) == sum(
            t.nbytes for t in stored.tensors().values()
        )
    for packed in (False, True):
        back = mgvq.load(tmp_path / "checkpoint", packed=packed)
        check_same_model(loaded, {}, back, "it", rounded)
    back = mgvq.load(tmp_path / "checkpoint")
    for name, stored in rounded.items():
        assert torch.equal(back.get_parameter(f"{name}.weight"), stored.decode())
    ends = [(m.get_input_embeddings().weight, m.get_output_embeddings().weight) for m in (loaded.model, back)]
    assert (ends[0][0] is ends[0][1]) == (ends[1][0] is ends[1][1]), "tied as before"
    with pytest.raises(UserError, match="not the model"):
        check_same_model(loaded, {}, back, "it")
    assert all(torch.equal(p, before[name]) for name, p in loaded.model.named_parameters()), "the model stays as it is"


@pytest.mark.parametrize("tied", [True, False])
def test_tied_ones_are_stored_once(loaded, tied, tmp_path):
    given = Loaded(text_model(tied), loaded.processor, torch.float32)
    ledger = save(tmp_path / "checkpoint", given, [], {}, round_embeddings(given.model, 8))
    assert [e.tensor for e in ledger.entries if e.tensor.endswith(".codes")] == [
        "model.embed_tokens.codes", *([] if tied else ["lm_head.codes"])
    ]  # fmt: skip
    back = mgvq.load(tmp_path / "checkpoint")
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == tied
    ids = torch.arange(20)[None]
    rounded = round_embeddings(given.model, 8)
    expected = text_model(tied)
    for name, stored in rounded.items():
        expected.get_parameter(f"{name}.weight").data = stored.decode()
    assert torch.equal(back(ids).logits, expected(ids).logits)


def test_what_cannot_be_rounded_is_refused():
    model = text_model(True)
    model.model.embed_tokens.weight.data[3, 4] = torch.inf
    with pytest.raises(UserError, match=r"embedding_bits: model\.embed_tokens cannot be rounded: .*finite"):
        round_embeddings(model, 8)
