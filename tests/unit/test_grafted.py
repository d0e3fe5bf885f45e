"""A language model that was taught to read images, put together of its parts: the same bytes every time."""

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

from mgvq.data.tiny_vqa.dataset import draw_image
from mgvq.errors import UserError
from mgvq.evaluation.tiny_vqa import TinyVQA
from mgvq.model.gguf import Gguf
from mgvq.model.grafted import ADAPTERS, MARKS, Grafted, assemble, config, merge, tokenizer
from mgvq.model.load import load
from mgvq.model.pack import can_pack
from mgvq.model.sites import list_sites
from mgvq.model.source import SHIPPED

TOWER = SHIPPED / "tiny_internvl"
RECIPE = Path(__file__).parents[2] / "experiments" / "train_smollm2_vlm"
RANK = 4


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two blocks with a byte-level tokenizer that has the special tokens of SmolLM2's."""
    path = tmp_path_factory.mktemp("language")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *dict.fromkeys(MARKS.values())]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(models.BPE({token: n for n, token in enumerate([*special, *alphabet])}, []))
    bytes_alone.pre_tokenizer, bytes_alone.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bytes_alone.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    PreTrainedTokenizerFast(tokenizer_object=bytes_alone, **ends).save_pretrained(path)
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 24}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=264, num_key_value_heads=2, tie_word_embeddings=True, **shape, **ids))
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=2)
    model.bfloat16().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapters(language: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters")
    draw = torch.Generator().manual_seed(1)
    tensors = {f"projector.{k}": v for k, v in InternVLMultiModalProjector(config(language, TOWER)).state_dict().items()}
    for number, kind, rows, columns in ((1, "q_proj", 96, 96), (2, "down_proj", 96, 64)):
        tensors[f"layers.{number}.{kind}.A"] = torch.randn(RANK, columns, generator=draw)
        tensors[f"layers.{number}.{kind}.B"] = torch.randn(rows, RANK, generator=draw) / 50
    save_file({k: v.bfloat16().contiguous() for k, v in tensors.items()}, path / ADAPTERS, {"scale": "2.0"})
    return path


def sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def source(language: Path, adapters: Path, cache: Path, revision: str | None) -> Grafted:
    digest = 64 * "a"
    (cache / digest).parent.mkdir(parents=True, exist_ok=True)
    if not (cache / digest).exists():
        (cache / digest).symlink_to(language)
    words = Gguf(name="x", path="x.gguf", revision=digest, dtype="float32", cache=str(cache))
    where = {"path": str(adapters), "tower": "tiny_internvl", "cache": str(cache)}
    return Grafted(name="grafted", revision=revision, dtype="float32", language=words, **where)


def test_equal_parts_make_equal_bytes(language: Path, adapters: Path, tmp_path: Path) -> None:
    """In any number of threads; and the digest of the weights is checked."""
    before = torch.get_num_threads()
    for number, threads in enumerate((1, 2)):
        torch.set_num_threads(threads)
        assemble(language, TOWER, adapters / ADAPTERS, tmp_path / str(number))
    torch.set_num_threads(before)
    assert sha256(tmp_path / "0") == sha256(tmp_path / "1")
    good = source(language, adapters, tmp_path / "cache", sha256(tmp_path / "0"))
    assert sha256(good.folder) == good.identity()
    with pytest.raises(UserError, match=f"has the SHA-256 {good.identity()}, but model.revision=bbb"):
        assert source(language, adapters, tmp_path / "cache", 64 * "b").folder
    with pytest.raises(UserError, match=r"needs model\.revision"):
        source(language, adapters, tmp_path / "cache", None).identity()


def test_it_is_its_parts(language: Path, adapters: Path, tmp_path: Path) -> None:
    """Text is read as the language model with W + s B A reads it, and the tower is the shipped one."""
    assemble(language, TOWER, adapters / ADAPTERS, tmp_path / "model")
    loaded = load(source(language, adapters, tmp_path / "cache", sha256(tmp_path / "model")), torch.device("cpu"))
    expected = LlamaForCausalLM.from_pretrained(language, dtype=torch.float32)
    learned = {k: v.float() for k, v in load_file(adapters / ADAPTERS).items()}
    for number, kind in ((1, "self_attn.q_proj"), (2, "mlp.down_proj")):
        weight = expected.get_submodule(f"model.layers.{number}.{kind}").weight.data
        name = f"layers.{number}.{kind.split('.')[1]}"
        weight.copy_((weight + 2 * learned[f"{name}.B"] @ learned[f"{name}.A"]).bfloat16().float())
    ids = torch.arange(30, 90)[None]
    torch.testing.assert_close(loaded.model(input_ids=ids).logits, expected(ids).logits, atol=2e-2, rtol=1e-2)
    tower = load_file(TOWER / "model.safetensors")["vision_tower.encoder.layer.0.mlp.fc1.weight"]
    assert torch.equal(loaded.model.model.vision_tower.encoder.layer[0].mlp.fc1.weight, tower.bfloat16().float())
    assert loaded.stored_dtype == torch.bfloat16
    assert can_pack(loaded.model)
    assert {site.tower for site in list_sites(loaded.model, "all")} == {"vision", "projector", "language"}
    found = TinyVQA(num_questions=8, seed=0, answers="forced")(loaded.model, None, loaded.processor, "")
    assert 0 < found.metrics["loss/answer"] < 50


def test_its_tokenizer_is_that_of_the_language_model(language: Path) -> None:
    """Also where a text holds what marks an image."""
    plain, marked = PreTrainedTokenizerFast.from_pretrained(language), tokenizer(language)
    for text in ("the value of the argument", f"a {MARKS['image_token']} b <image> c", "<|im_start|>user\nhé<|im_end|>"):
        assert plain(text).input_ids == marked(text).input_ids
    assert len(plain) == len(marked)


def test_parts_that_do_not_fit_are_named(language: Path, adapters: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapters\.safetensors is missing"):
        assemble(language, TOWER, tmp_path / ADAPTERS, tmp_path / "model")
    weights = load_file(language / "model.safetensors")
    pair = {"layers.9.q_proj.A": torch.zeros(2, 96), "layers.9.q_proj.B": torch.zeros(96, 2)}
    with pytest.raises(UserError, match=r"layers\.9\.q_proj\.A fits no layer"):
        merge(weights, pair, 1.0)
    with pytest.raises(UserError, match="of another shape"):
        merge(weights, {"layers.1.k_proj.A": torch.zeros(2, 95), "layers.1.k_proj.B": torch.zeros(48, 2)}, 1.0)


def test_what_is_trained_is_what_is_assembled(language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps of the recipe; then the packed rows of the trainer have the logits of the assembled model, asked one by one."""
    monkeypatch.syspath_prepend(str(RECIPE))
    import train

    recipe = train.Recipe(images=80, epochs=1, steps=3, decay=2, caption_until=2, row_tokens=400, rate=0.02, warmup=1)
    trainer = train.Trainer(language, recipe, tmp_path)
    trainer.look()
    while trainer.step < recipe.steps:
        trainer.train_step()
    trainer.save()
    again = train.Trainer(language, recipe, tmp_path)
    assert again.resume()
    assert again.step == recipe.steps
    again.export()
    assemble(language, TOWER, tmp_path / ADAPTERS, tmp_path / "model")
    given = source(language, tmp_path, tmp_path / "cache", sha256(tmp_path / "model"))
    loaded = load(given, torch.device("cpu"))
    image = draw_image("validation", 1, 0, 3)
    packed = again.packer.pack([again.packer.row(image.questions, 10_000)])
    with torch.no_grad():
        together = again.answer_logits(packed, [image])
    alone = []
    for question in image.questions:
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        prompt = loaded.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        text = f"{prompt}{question.answer}<|im_end|>"
        logits = loaded.model(**loaded.processor(images=[image.pixels], text=[text], return_tensors="pt")).logits[0]
        alone.append(logits[-len(question.answer.encode()) - 2 : -1])
    assert together.shape == torch.cat(alone).shape
    # Weights are rounded to bfloat16 in between.
    assert (torch.cat(alone) - together).norm() < 0.03 * together.norm()
    for name in ("train", "language", "packing", "projector"):
        sys.modules.pop(name, None)


def test_the_trainer_holds_the_text(language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The KL on text is zero before the adapters have learned, and its gradient reaches them after."""
    monkeypatch.syspath_prepend(str(RECIPE))
    import train

    trainer = train.Trainer(language, train.Recipe(text_tokens=32), tmp_path)
    assert abs(trainer.text_loss(0).item()) < 1e-5
    for name, adapter in trainer.language.adapters.items():
        if name.endswith("_B"):
            torch.nn.init.normal_(adapter, std=0.05)
    loss = trainer.text_loss(0)
    loss.backward()
    assert loss.item() > 1e-3
    assert all(adapter.grad is not None for adapter in trainer.language.adapters.values())
    for name in ("train", "language", "packing", "projector"):
        sys.modules.pop(name, None)


def test_the_decoder_of_the_trainer_is_transformers_own(language: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPE))
    from language import Language

    model = LlamaForCausalLM.from_pretrained(language, dtype=torch.float32)
    decoder = Language(model, seed=0)
    ids = torch.arange(20, 52)[None]
    with torch.no_grad():
        hidden = decoder(decoder.embedding[ids], torch.arange(32)[None], None)
        torch.testing.assert_close(hidden, model.model(ids).last_hidden_state, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(decoder.logits(hidden), model(ids).logits, atol=1e-3, rtol=1e-3)
    sys.modules.pop("language", None)
