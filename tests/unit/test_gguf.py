"""A GGUF file as the source of a model: planned by its digest, refused in words, read as the model that was written."""

import hashlib
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from mgvq.errors import UserError
from mgvq.model.gguf import Gguf, unpack
from mgvq.model.load import load
from mgvq.model.terms import licence_of, term_files
from mgvq.runs.compose import composer
from mgvq.runs.identity import run_id
from mgvq.studies.plan import build_components, expand
from mgvq.studies.spec import read_study

CONTENT = b"GGUF\x03\x00\x00\x00, but no more of it"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
reads = pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed; `make smollm2` does it")


def source(file: Path, digest: str | None = DIGEST, **more: Any) -> Gguf:
    return Gguf(name="x", path=str(file), revision=digest, dtype="float32", cache=str(file.parent / "cache"), **more)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, vocab_size=300, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.copy_((parameter.data * 3).bfloat16().float())  # as it is stored
    return model


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q_proj and k_proj as llama.cpp keeps them: its rotary positions turn neighbours."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write(file: Path, *, begin: bool = True, architecture: str = "llama", left_out: str = "", tokenizer: bool = True) -> None:
    """The model as llama.cpp would write it, in 32 bits, with a byte-level tokenizer that begins texts with a token."""
    from gguf import GGUFWriter
    from tokenizers import pre_tokenizers

    model = llama()
    writer = GGUFWriter(file, architecture)
    writer.add_name("made")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(300)
    if tokenizer:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = ["<end>", "<begin>", *alphabet, "he", *(f"<unused{n}>" for n in range(41))]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
        writer.add_token_merges(["h e"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(0)
        writer.add_pad_token_id(0)
        writer.add_unk_token_id(0)
        writer.add_add_bos_token(begin)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    kinds = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    names |= {f"blk.{n}.{theirs}": f"model.layers.{n}.{ours}" for n in range(2) for theirs, ours in kinds.items()}
    state = model.state_dict()
    for theirs, ours in names.items():
        weight = state[f"{ours}.weight"]
        if theirs.endswith(("attn_q", "attn_k")):
            weight = permuted(weight, 4 if theirs.endswith("q") else 2)
        if theirs != left_out:
            writer.add_tensor(f"{theirs}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("model", ["smollm2", "gemma3_270m"])
def test_a_run_is_planned_without_the_file(model: str) -> None:
    with composer() as compose:
        first, moved = (
            compose(f"model={model}", "method=kmeans", "evaluation=perplexity", *more)
            for more in ([], ["model.path=/nowhere/x.gguf", "paths.results=/nowhere"])
        )
    assert run_id(first) == run_id(moved)


@pytest.mark.parametrize("model", ["smollm2", "gemma3_270m", "smollm2_vlm"])
def test_a_study_of_a_model_that_is_not_here_starts_no_run(tmp_path: Path, model: str) -> None:
    file, study = tmp_path / "nowhere.gguf", tmp_path / "study.yaml"
    own = f"model{'.language' if model == 'smollm2_vlm' else ''}.path={file}"
    common = [f"model={model}", "evaluation=perplexity", own, f"paths.results={tmp_path}"]
    study.write_text(
        yaml.safe_dump({"name": "s", "question": "q", "common": common, "arms": {"rtn": ["method=rtn"]}, "seeds": [0]})
    )
    runs = expand(read_study(study))
    with pytest.raises(UserError, match=rf"arm rtn .*{file} is missing: `make (smollm2|gemma3)` installs it"):
        build_components(runs)


@pytest.mark.parametrize("digest", ["main", DIGEST[:40]])
def test_a_revision_that_is_no_digest_is_refused(tmp_path: Path, digest: str) -> None:
    with pytest.raises(UserError, match=r"model\.revision must be its SHA-256"):
        source(tmp_path / "x.gguf", digest).identity()


def test_without_a_revision_the_digest_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "x.gguf").write_bytes(CONTENT)
    with caplog.at_level(logging.INFO):
        assert source(tmp_path / "x.gguf", None).identity() == DIGEST
    assert f"model.revision={DIGEST}" in caplog.text


@pytest.mark.parametrize("digest", [DIGEST, None])
@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("x.gguf", None, "is missing: give the path"),
        ("x.gguf", b"PK\x03\x04and so on", r"is no GGUF file: it begins with b'PK"),
        ("x.gguf", b"", r"is no GGUF file: it begins with b''"),
        ("x.gguf", b"GGUF\x00\x00\x00\x03", "of version 50331648, read as little-endian"),
        ("x.gguf", b"GGUF\x01\x00\x00\x00", "of version 1,"),
        ("x-00001-of-00002.gguf", CONTENT, "is one part of a split GGUF file"),
    ],
)
def test_what_is_no_gguf_file_is_named(tmp_path: Path, digest: str | None, name: str, content: bytes | None, named: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=named):
        assert source(tmp_path / name, digest).folder


def test_a_folder_and_another_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder: `make smollm2` installs it"):
        assert source(tmp_path, setup="make smollm2").folder
    (tmp_path / "x.gguf").write_bytes(CONTENT)
    with pytest.raises(UserError, match=f"its SHA-256 is {DIGEST}"):
        assert source(tmp_path / "x.gguf", 64 * "0").folder


def test_without_the_reader_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").write_bytes(CONTENT)
    monkeypatch.setattr("mgvq.model.gguf.find_spec", lambda _: None)
    with pytest.raises(UserError, match="the package gguf is not installed: `make smollm2`"):
        assert source(tmp_path / "x.gguf").folder


def test_what_is_unpacked_is_not_read_again(tmp_path: Path) -> None:
    (tmp_path / "cache" / DIGEST).mkdir(parents=True)
    assert source(tmp_path / "gone.gguf").folder == tmp_path / "cache" / DIGEST


def test_terms_beside_the_file_travel_with_the_model(tmp_path: Path) -> None:
    """Also with one that was unpacked before they were there; weights of the same folder do not."""
    terms = {"GEMMA_TERMS.html": "terms", "NOTICE.md": "notice", "README.upstream.md": "---\nlicense: gemma\n---\n"}
    unpacked = tmp_path / "cache" / DIGEST
    unpacked.mkdir(parents=True)
    assert (licence_of(source(tmp_path / "x.gguf").folder), term_files(unpacked)) == (None, ())
    for name, text in {**terms, "SHA256SUMS": "other", "determs.json": "other"}.items():
        (tmp_path / name).write_text(text)
    for _ in range(2):
        assert licence_of(source(tmp_path / "x.gguf").folder) == "gemma"
        assert {file.name: file.read_text() for file in unpacked.iterdir()} == terms
        assert [file.name for file in term_files(unpacked)] == ["GEMMA_TERMS.html", "NOTICE.md"]


@reads
@pytest.mark.parametrize("begin", [True, False])
def test_it_is_the_model_that_was_written(tmp_path: Path, begin: bool) -> None:
    """To the last bit, and its tokenizer begins a text as the file says."""
    write(tmp_path / "x.gguf", begin=begin)
    given = source(tmp_path / "x.gguf", None)
    loaded = load(given, torch.device("cpu"))
    expected = llama()
    assert loaded.stored_dtype == torch.bfloat16
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    ids = torch.arange(20)[None]
    torch.testing.assert_close(loaded.model(ids).logits, expected(ids).logits)
    tokens = loaded.processor("he is").input_ids
    assert (tokens[0] == 1) == begin
    assert loaded.processor.decode(tokens, skip_special_tokens=True) == "he is"
    assert given.provenance()["sha256"] == hashlib.sha256((tmp_path / "x.gguf").read_bytes()).hexdigest()
    assert sorted(f.name for f in (tmp_path / "cache").iterdir()) == sorted([given.identity(), f"{given.identity()}.lock"])


@reads
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"architecture": "clip"}, r"cannot be read as a language model \(.*clip.*\)\. The file must be whole.*llama"),
        ({"tokenizer": False}, "cannot be read as a language model"),
        ({"left_out": "blk.1.ffn_down"}, r"1 missing \(model\.layers\.1\.mlp\.down_proj\.weight\)"),
    ],
)
def test_what_transformers_does_not_read_is_refused(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    write(tmp_path / "x.gguf", **settings)
    with pytest.raises(UserError, match=named):
        assert source(tmp_path / "x.gguf", None).folder
    assert not any(f.is_dir() and f.suffix != ".tmp" for f in (tmp_path / "cache").iterdir())


@reads
def test_a_file_that_breaks_off_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "whole.gguf")
    content = (tmp_path / "whole.gguf").read_bytes()
    for number, length in enumerate((40, len(content) // 2, len(content) - 100)):
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match="cannot be read as a language model"):
            unpack(file, tmp_path / f"out{number}")
