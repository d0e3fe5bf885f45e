"""Models that the project does not name: towers, sites, masks and statistics from structure alone.

The configs are the published ones of the hub's models, shrunk in sizes and nothing else; the weights are random.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_command
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    GenerationConfig,
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SiglipImageProcessor,
)

from mgvq.curvature.statistics import collect
from mgvq.errors import UserError
from mgvq.evaluation.documents import documents
from mgvq.model.answers import answer_logits
from mgvq.model.encode import Example, encode
from mgvq.model.load import load
from mgvq.model.pack import can_pack, packed_batches
from mgvq.model.sites import list_sites
from mgvq.model.source import SHIPPED, Source
from mgvq.model.towers import find_towers
from mgvq.types import Needs

TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 448, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
QWEN2 = {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True, **TEXT}
SIGLIP = {"model_type": "siglip_vision_model", "patch_size": 14, "image_size": 56, "vision_use_head": False, **VISION}
TEMPLATE = (
    "{% for m in messages %}{% for part in m['content'] %}{{ IMAGE if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def config(model_type: str, **settings: Any) -> Any:
    return AutoConfig.for_model(model_type, **settings)


def smolvlm(model_type: str = "idefics3") -> Any:  # SmolVLM-256M-Instruct; SmolVLM2-256M-Video-Instruct
    text = {"model_type": "llama", "rope_theta": 1e5, "rms_norm_eps": 1e-5, **TEXT}
    vision = {"patch_size": 16, "image_size": 128, **VISION}
    return config(model_type, text_config=text, vision_config=vision, image_token_id=4, scale_factor=4, pad_token_id=0)


def llava_onevision() -> Any:  # llava-onevision-qwen2-0.5b-ov
    tiles = {"image_grid_pinpoints": [[56, 56], [56, 112], [112, 56]], "vision_aspect_ratio": "anyres_max_9"}
    return config("llava_onevision", text_config=QWEN2, vision_config=SIGLIP, image_token_index=4, video_token_index=5,
                  tie_word_embeddings=True, **tiles)  # fmt: skip


def internvl() -> Any:  # InternVL3-1B-hf
    vision = {"model_type": "internvl_vision", "attention_bias": True, "image_size": [56, 56], "patch_size": [14, 14], **VISION}
    return config("internvl", text_config=QWEN2, vision_config=vision, image_token_id=4, image_seq_length=4)


def qwen2_vl() -> Any:  # Qwen2-VL-2B-Instruct
    text = {**QWEN2, "model_type": "qwen2_vl_text", "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision = {"depth": 3, "embed_dim": 32, "num_heads": 4, "hidden_size": 64}
    return config("qwen2_vl", text_config=text, vision_config=vision, image_token_id=10, video_token_id=11,
                  vision_start_token_id=8, vision_end_token_id=9, tie_word_embeddings=True)  # fmt: skip


def qwen2_5_vl() -> Any:  # Qwen2.5-VL-3B-Instruct
    text = {**QWEN2, "model_type": "qwen2_5_vl_text", "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision = {"depth": 3, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 64,
              "fullatt_block_indexes": [1]}  # fmt: skip
    return config("qwen2_5_vl", text_config=text, vision_config=vision, image_token_id=10, video_token_id=11,
                  vision_start_token_id=8, vision_end_token_id=9, tie_word_embeddings=True)  # fmt: skip


def qwen3_vl() -> Any:  # Qwen3-VL-2B-Instruct
    text = {**QWEN2, "model_type": "qwen3_vl_text", "head_dim": 16,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2]}}  # fmt: skip
    vision = {"depth": 3, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 64,
              "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}  # fmt: skip
    return config("qwen3_vl", text_config=text, vision_config=vision, image_token_id=10, video_token_id=11)


def llava() -> Any:  # llava-1.5-7b-hf
    vision = {"model_type": "clip_vision_model", "patch_size": 14, "image_size": 56, "projection_dim": 32, **VISION}
    text = {"model_type": "llama", "rms_norm_eps": 1e-5, **TEXT}
    return config(
        "llava", text_config=text, vision_config=vision, image_token_index=4, vision_feature_layer=-2, image_seq_length=16
    )


def gemma3() -> Any:  # gemma-3-4b-it
    text = {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 8, **TEXT}
    return config("gemma3", text_config=text, vision_config=SIGLIP, mm_tokens_per_image=4, image_token_index=4)


def paligemma() -> Any:  # paligemma2-3b
    text = {"model_type": "gemma2", "head_dim": 16, **TEXT}
    return config(
        "paligemma", text_config=text, vision_config={**SIGLIP, "projection_dim": 64}, projection_dim=64, image_token_index=4
    )


SIDE = {"height": 56, "width": 56}
AREA = {"size": {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}}


def tokens(image: str = "<image>", **more: str) -> PreTrainedTokenizerFast:
    names = {"image_token": image, "video_token": "<video>", **more}
    return PreTrainedTokenizerFast.from_pretrained(SHIPPED / "tiny_internvl", extra_special_tokens=names)


def qwen_processor(template: str) -> Any:
    template = template.replace("IMAGE", "'<|vision_start|><|image_pad|><|vision_end|>'")
    return Qwen2VLProcessor(Qwen2VLImageProcessor(**AREA), tokens("<|image_pad|>"), Qwen2VLVideoProcessor(**AREA), template)


def llava_onevision_processor(template: str) -> Any:
    tiles = llava_onevision().image_grid_pinpoints
    images = LlavaOnevisionImageProcessor(size=SIDE, image_grid_pinpoints=tiles)
    return LlavaOnevisionProcessor(images, tokens(), LlavaOnevisionVideoProcessor(size=SIDE), num_image_tokens=16,
                                   vision_feature_select_strategy="full", chat_template=template)  # fmt: skip


def internvl_processor(template: str) -> Any:
    marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<image>"}
    images = GotOcr2ImageProcessor(size=SIDE, max_patches=12)
    return InternVLProcessor(
        images, tokens(**marks), InternVLVideoProcessor(size=SIDE), image_seq_length=4, chat_template=template
    )


def smolvlm_processor(template: str) -> Any:
    """With image splitting, as published: tiles and the whole."""
    images = Idefics3ImageProcessor(size={"longest_edge": 256}, max_image_size={"longest_edge": 128})
    marked = tokens()
    marked.add_tokens(["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"], special_tokens=True)
    return Idefics3Processor(images, marked, image_seq_len=4, chat_template=template)


def llava_processor(template: str) -> Any:
    images = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=SIDE)
    return LlavaProcessor(images, tokens(), patch_size=14, vision_feature_select_strategy="default", chat_template=template,
                          num_additional_image_tokens=1)  # fmt: skip


def paligemma_processor(template: str) -> Any:
    images = SiglipImageProcessor(size=SIDE)
    images.image_seq_length = 16
    marked = tokens()
    marked.bos_token = "<|user|>"
    return PaliGemmaProcessor(images, marked, chat_template=template)


MODELS: dict[str, tuple[Callable[[], Any], dict[str, tuple[str, ...]]]] = {
    "smolvlm": (smolvlm, {"vision": ("vision_model",), "projector": ("connector",), "language": ("text_model",)}),
    "smolvlm2": (
        lambda: smolvlm("smolvlm"),
        {"vision": ("vision_model",), "projector": ("connector",), "language": ("text_model",)},
    ),
    "qwen2_vl": (qwen2_vl, {"vision": ("visual",), "projector": ("visual.merger",), "language": ("language_model",)}),
    "qwen2_5_vl": (qwen2_5_vl, {"vision": ("visual",), "projector": ("visual.merger",), "language": ("language_model",)}),
    "qwen3_vl": (
        qwen3_vl,
        {"vision": ("visual",), "projector": ("visual.merger", "visual.deepstack_merger_list"), "language": ("language_model",)},
    ),
    **{
        make.__name__: (
            make,
            {"vision": ("vision_tower",), "projector": ("multi_modal_projector",), "language": ("language_model",)},
        )
        for make in (llava_onevision, internvl, llava, gemma3, paligemma)
    },
}
PROCESSORS = {
    "smolvlm": smolvlm_processor,
    "qwen2_vl": qwen_processor,
    "qwen2_5_vl": qwen_processor,
    "llava_onevision": llava_onevision_processor,
    "internvl": internvl_processor,
    "llava": llava_processor,
}


def random_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(MODELS[name][0]()).eval().requires_grad_(False)
    for parameter in model.parameters():  # the published initialisation hardly lets the picture through
        if parameter.ndim >= 2:
            parameter.mul_(4)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0, do_sample=False)
    return model


def saved(name: str, folder: Path) -> Path:
    """The model and its processor in the hub's format."""
    random_model(name).save_pretrained(folder)
    PROCESSORS[name](TEMPLATE.replace("IMAGE", "'<image>'") if "qwen" not in name else TEMPLATE).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_towers_and_sites(name: str) -> None:
    """Every linear layer but the head is a site of one tower; blocks are counted through."""
    model, (_, expected) = random_model(name), MODELS[name]
    assert find_towers(model).modules == {tower: tuple(f"model.{n}" for n in names) for tower, names in expected.items()}
    sites = list_sites(model, "all")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()}
    assert {s.name: (s.out_features, s.in_features) for s in sites} == {n: tuple(m.weight.shape) for n, m in layers.items()}
    assert [s.tower for s in sites] == sorted((s.tower for s in sites), key=["vision", "projector", "language"].index)
    for tower, depth in (("vision", 3), ("projector", 0), ("language", 2)):
        assert sorted({s.block for s in sites if s.tower == tower and s.block is not None}) == list(range(depth))
    together = {s.kind for s in sites if s.reads.endswith(".qkv") and s.tower == "language"}
    assert together == {"q_proj", "k_proj", "v_proj"}


@pytest.mark.parametrize("name", PROCESSORS)
def test_loaded_from_the_hub_format_it_is_calibrated_and_answers(name: str, tmp_path: Path) -> None:
    loaded = load(Source(name=name, path=str(saved(name, tmp_path)), revision=None, dtype="float32"), torch.device("cpu"))
    model, docs = loaded.model, documents(0, 12)[::4]
    batch = encode(loaded.processor, [Example(d["sample_id"], d["image"], d["question"], d["answer"]) for d in docs])
    assert batch.image_mask.any(1).all()
    assert not (batch.image_mask & ~batch.valid_mask).any()
    bank = collect(model, list_sites(model, "all"), [batch], Needs(gram=True, fisher=True, saliency=True, gradient=True), 0)
    assert {stats.num_tokens["image"] for s, stats in bank.items() if s.tower == "language"} == {batch.image_mask.sum().item()}
    assert not [s.name for s, stats in bank.items() if not stats.gram["image"].any()]
    # Greedy decoding, step by step and padded on the left, computes what one forward pass over all tokens does.
    prompts = _without_answers(batch.inputs, batch.loss_mask)
    out = model.generate(**prompts, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True, output_logits=True)
    num_prompt = prompts["input_ids"].shape[1]
    whole = _extended(prompts, out.sequences[:, num_prompt:])
    with torch.no_grad():
        logits = model(**whole).logits[:, num_prompt - 1 : -1]
    torch.testing.assert_close(logits, torch.stack(out.logits, 1), atol=2e-3, rtol=1e-3)


def _without_answers(inputs: Any, loss_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every row without as many tokens at its end as the longest answer has."""
    longest = int(loss_mask.sum(1).max())
    return {k: v[:, :-longest] if v.shape == loss_mask.shape else v for k, v in inputs.items()}


def _extended(inputs: dict[str, torch.Tensor], new: torch.Tensor) -> dict[str, torch.Tensor]:
    ones = torch.ones_like(new)
    more = {"input_ids": new, "attention_mask": ones, "mm_token_type_ids": 0 * ones}
    return {k: torch.cat([v, more[k]], 1) if k in more else v for k, v in inputs.items()}


@pytest.mark.parametrize("name", MODELS)
def test_who_can_pack(name: str) -> None:
    """Not M-RoPE (Qwen), not image tokens that see each other (Gemma 3, PaliGemma), not windows (both Gemmas)."""
    assert can_pack(random_model(name)) == (name in ("smolvlm", "smolvlm2", "llava_onevision", "internvl", "llava"))


@pytest.mark.parametrize("name", ["smolvlm", "llava_onevision", "internvl", "llava"])
def test_questions_that_share_a_row_are_answered_as_if_alone(name: str) -> None:
    model, processor = random_model(name), PROCESSORS[name](TEMPLATE.replace("IMAGE", "'<image>'"))
    processor.tokenizer.padding_side = "left"
    asked = [Example(d["sample_id"], d["image"], d["question"], d["answer"]) for d in documents(0, 16)]
    (packed,) = packed_batches(processor, asked, 16)
    with torch.no_grad():
        alone = torch.cat([answer_logits(model, encode(processor, [e])) for e in asked])
        torch.testing.assert_close(answer_logits(model, packed), alone, atol=1e-3, rtol=1e-3)
    assert len(packed.loss_mask) < len(asked)
    assert alone.std(0).mean() > 0.1  # the questions do differ


def test_a_class_that_nobody_named_runs_to_the_end(tmp_path: Path) -> None:
    """Llava: quantised, saved packed, loaded back, questioned through lmms-eval."""
    source = saved("llava", tmp_path / "model")
    settings = ["model=local", f"model.path={source}", "method=kmeans", "evaluation.num_questions=8"]
    done = run_command("mgvq.cli.run", *settings, results=tmp_path / "results")
    run = Path(done.stdout.splitlines()[-1])
    assert (run / "DONE").is_file()
    assert not [p for p in (ROOT / "mgvq").rglob("*.py") if "LlavaForConditionalGeneration" in p.read_text()]


@pytest.mark.parametrize("kept", sorted(Path(__file__).with_name("sites").iterdir()), ids=lambda path: path.stem)
def test_shipped_models_keep_their_sites(kept: Path) -> None:
    """Order, names, towers, kinds, blocks and readers, as they were when the first studies were run."""
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED / kept.stem)
    sites = [
        f"{s.name} {s.tower} {s.kind} {s.block} {s.out_features} {s.in_features} {s.reads}" for s in list_sites(model, "all")
    ]
    assert sites == kept.read_text().splitlines()


def two_vision_towers() -> PreTrainedModel:
    model = random_model("llava")
    model.model.second = type(model.model.vision_tower)(model.config.vision_config)
    return model


def another_model_beside() -> PreTrainedModel:
    model = random_model("llava")
    model.model.adapter = type(model.model.language_model)(model.config.text_config)
    return model


def no_projector() -> PreTrainedModel:
    model = random_model("llava")
    model.model.multi_modal_projector = torch.nn.Identity()
    return model


def too_narrow_projector() -> PreTrainedModel:
    model = random_model("llava")
    model.model.multi_modal_projector = torch.nn.Linear(32, 63)
    return model


def no_vision_config() -> PreTrainedModel:
    model = random_model("llava")
    del model.config.vision_config
    return model


@pytest.mark.parametrize(
    "broken", [two_vision_towers, another_model_beside, no_projector, too_narrow_projector, no_vision_config]
)
def test_a_wrong_guess_is_an_error_that_shows_the_modules(broken: Callable[[], PreTrainedModel]) -> None:
    with pytest.raises(
        UserError, match=r"towers of LlavaForConditionalGeneration(.|\n)*\n  model.language_model: LlamaModel, [1-9]"
    ):
        find_towers(broken())


def test_a_scope_without_layers_of_its_own_is_an_error() -> None:
    with pytest.raises(UserError, match="holds no linear layer"):
        list_sites(random_model("gemma3"), "language_projector")


def test_blocks_of_other_things_than_linear_layers_are_an_error() -> None:
    model = random_model("llava")
    for layer in model.model.language_model.layers:
        layer.experts = torch.nn.Parameter(torch.zeros(8, 64, 96))
    with pytest.raises(UserError, match=r"in the blocks of model\.language_model \(Llava.* are in linear layers"):
        list_sites(model, "language")


def test_another_image_token_than_the_models_is_an_error(tmp_path: Path) -> None:
    folder = saved("llava", tmp_path)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"image_token_index": 4', '"image_token_index": 6'))
    with pytest.raises(UserError, match=r"token 6, its processor .* by token 4"):
        load(Source(name="x", path=str(folder), revision=None, dtype="float32"), torch.device("cpu"))


def test_a_processor_that_adds_behind_the_answer_is_an_error() -> None:
    processor = paligemma_processor(TEMPLATE.replace("IMAGE", "'<image>'"))
    with pytest.raises(UserError, match=r"PaliGemmaProcessor has .* in the place of the answer .*four"):
        encode(processor, [Example("x", documents(0, 1)[0]["image"], "how many ?", "four")])


def test_a_model_that_is_shown_the_answer_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = {"model_type": "gemma3_text", "head_dim": 16, "use_bidirectional_attention": True, **TEXT}
    monkeypatch.setitem(MODELS, "llava", (lambda: seeing(text), {}))
    folder = saved("llava", tmp_path)
    with pytest.raises(UserError, match=r"LlavaForConditionalGeneration predicts the first token of an answer from the whole"):
        load(Source(name="x", path=str(folder), revision=None, dtype="float32"), torch.device("cpu"))


def seeing(text: dict[str, Any]) -> Any:
    """Llava with another language tower."""
    settings = llava().to_dict() | {"text_config": text}
    return config(settings.pop("model_type"), **settings)
