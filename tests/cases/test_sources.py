"""Sources that are not what they seem, by kind. A new one is a line: what is done to a shipped model, and what is said."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made import BLOCK, CPU, copy, edit_json, edit_tensors, run, source
from PIL import Image
from safetensors.torch import load_file

import mgvq
from mgvq.checkpoint.check import check_same_logits, check_same_model
from mgvq.checkpoint.save import save
from mgvq.errors import UserError
from mgvq.evaluation.documents import documents
from mgvq.model.answers import answer_logits
from mgvq.model.device import find_device
from mgvq.model.encode import Example, batches, encode
from mgvq.model.generate import Reply, generate
from mgvq.model.load import describe, load
from mgvq.model.pack import can_pack, packed_batches
from mgvq.model.shape import empty_model
from mgvq.model.sites import left_out_flags, list_sites
from mgvq.model.towers import find_towers
from mgvq.runs.build import build
from mgvq.runs.compose import composer

Edit = Callable[[Path], Any]


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    return lambda folder: edit_tensors(folder, edit)


def config(edit: Callable[[dict[str, Any]], Any], name: str = "config.json") -> Edit:
    return lambda folder: edit_json(folder / name, edit)


def text(name: str, content: str | bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def put(tensor: torch.Tensor, place: int, value: float) -> None:
    tensor.view(-1)[place] = value


def no(*keys: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: [content.pop(key, None) for key in keys]


def cut(name: str) -> Edit:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-200])


def sharded(folder: Path) -> None:
    """The weights in a shard that the index names, and a second one that is not there."""
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    places = dict.fromkeys(load_file(folder / "model-1.safetensors"), "model-1.safetensors")
    index = {"weight_map": {**places, f"{BLOCK}.mlp.down_proj.weight": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


STORED = "language_model.model.layers.1"
DOWN, BIAS, NORM = f"{STORED}.mlp.down_proj.weight", f"{STORED}.self_attn.q_proj.bias", "language_model.model.norm.weight"
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
REFUSED: dict[str, tuple[Edit, str]] = {
    # numbers that are none
    "nan in a bias": (tensors(lambda t: put(t[BIAS], 3, float("nan"))), rf"model\.safetensors: 1 tensors hold NaN.*{BIAS}"),
    "infinity in a weight": (tensors(lambda t: put(t[DOWN], 9, float("inf"))), rf"model\.safetensors: .*infinity \({DOWN}\)"),
    "nan in a norm": (tensors(lambda t: put(t[NORM], 0, float("nan"))), rf"hold NaN or infinity \({NORM}\)"),
    "nan in the vision tower": (
        tensors(lambda t: put(t["vision_tower.embeddings.patch_embeddings.projection.weight"], 0, float("nan"))),
        "hold NaN.*vision_tower",
    ),
    "all weights nan": (tensors(lambda t: [x.fill_(float("nan")) for x in t.values()]), r"tensors hold NaN.* and \d+ more"),
    # weights that are not those of the class
    "a weight is missing": (tensors(no(DOWN)), rf"1 missing \({BLOCK}\.mlp\.down_proj\.weight\).*random"),
    "many are missing": (
        tensors(lambda t: [t.pop(k) for k in list(t) if "mlp" in k and "language" in k]),
        r"12 missing .* and 9 more",
    ),
    "a weight too many": (tensors(lambda t: t.update(extra=torch.zeros(3))), r"1 unexpected \(extra\)"),
    "another shape": (
        tensors(lambda t: t.update({DOWN: t[DOWN][:, :-8].contiguous()})),
        rf"1 of another shape \({BLOCK}\.mlp\.down_proj\.weight: \(256, 248\) for \(256, 256\)\)",
    ),
    "a config of more layers": (
        config(lambda c: c["text_config"].update(num_hidden_layers=5, layer_types=["full_attention"] * 5)),
        r"12 missing \(model\.language_model\.layers\.4",
    ),
    # not a source
    "quantised already": (config(lambda c: c.update(quantization_config={"quant_method": "awq"})), r"quantised already \(awq"),
    "quantised in a part": (
        config(lambda c: c["text_config"].update(quantization_config={"quant_method": "gptq"})),
        r"quantised already \(gptq",
    ),
    # files that are damaged or not there
    "weights of 8 bits": (
        tensors(lambda t: t.update({DOWN: t[DOWN].to(torch.int8)})),
        rf"stored as I8 \({DOWN}\).*quantised already",
    ),
    "weights of float8": (tensors(lambda t: t.update({DOWN: t[DOWN].to(torch.float8_e4m3fn)})), r"stored as F8_E4M3 .*quantised"),
    "complex weights": (tensors(lambda t: t.update({DOWN: t[DOWN].to(torch.complex64)})), r"stored as C64 .*quantised already"),
    "nan in bfloat16": (tensors(lambda t: t.update({DOWN: t[DOWN].bfloat16().fill_(float("nan"))})), rf"infinity \({DOWN}\)"),
    "images of no size": (
        config(lambda c: c["image_processor"].update(size={"height": 0, "width": 0}), "processor_config.json"),
        r"its processor can do nothing with a grey image",
    ),
    "images divided by zero": (
        config(lambda c: c["image_processor"].update(image_std=[0, 0, 0]), "processor_config.json"),
        r"its processor makes pixel_values of NaN or infinity",
    ),
    "a shard is missing": (sharded, r"is incomplete: model-2\.safetensors missing"),
    "weights cut off": (cut("model.safetensors"), r"model\.safetensors is damaged"),
    "weights empty": (text("model.safetensors", b""), r"model\.safetensors is damaged"),
    "config empty": (text("config.json", ""), r"config\.json cannot be read"),
    "config a list": (text("config.json", "[]"), r"config\.json holds no object"),
    "config no text": (text("config.json", b"\xff\xfe\x00"), r"config\.json cannot be read"),
    "config of nobody": (text("config.json", "{}"), r"no class for model_type None"),
    "config with a text as a size": (config(lambda c: c["text_config"].update(hidden_size="wide")), r"cannot be loaded"),
    "tokenizer cut off": (cut("tokenizer.json"), r"tokenizer\.json is damaged"),
    "tokenizer settings no text": (text("tokenizer_config.json", b"\xff"), r"tokenizer_config\.json is damaged"),
    "processor empty": (text("processor_config.json", ""), r"processor_config\.json is damaged"),
    "generation settings cut off": (text("generation_config.json", '{"eos'), r"generation_config\.json"),
    "template no text": (text("chat_template.jinja", b"\xff\xfe"), r"chat_template\.jinja is damaged"),
    # tokens and templates that no run can do without
    "no end token": (config(no("eos_token"), "tokenizer_config.json"), r"no end token.*model\.end_token=TOKEN, such as"),
    "no pad token": (config(no("pad_token"), "tokenizer_config.json"), r"no pad token.*model\.pad_token=TOKEN, such as '<pad>'"),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), r"no chat template.*model\.chat_template=FILE"),
    "template no jinja": (text("chat_template.jinja", "{% for %}"), r"chat template .* refuses.*model\.chat_template=FILE"),
    "template for texts alone": (
        text("chat_template.jinja", "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"),
        r"chat template .* refuses.*model\.chat_template=FILE",
    ),
    "another image token": (config(lambda c: c.update(image_token_id=5)), r"in the places of token 5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_source_that_would_give_wrong_numbers_is_refused_by_name(case: str, tmp_path: Path) -> None:
    edit, named = REFUSED[case]
    folder = copy(tmp_path / "m")
    edit(folder)
    with pytest.raises(UserError, match=named) as caught:
        load(source(folder), CPU)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_as_a_source_is_told_what_it_is(tmp_path: Path) -> None:
    loaded = load(source(copy(tmp_path / "m")), CPU)
    save(tmp_path / "checkpoint", loaded, [], {})
    with pytest.raises(UserError, match=r"is an mgvq checkpoint.*mgvq\.load\('.*checkpoint'\)"):
        load(source(tmp_path / "checkpoint"), CPU)


def test_numbers_too_large_for_the_dtype_are_told_from_damage(tmp_path: Path) -> None:
    folder = copy(tmp_path / "m")
    edit_tensors(folder, lambda t: t.update({NORM: torch.full_like(t[NORM], 1e5, dtype=torch.float32)}))
    with pytest.raises(
        UserError,
        match=r"1 tensors are NaN or infinite in torch\.float16 \(model\.language_model\.norm\.weight\), and finite in the files",
    ):
        load(source(folder, dtype="float16"), CPU)


def test_answers_that_overflow_name_the_layer(tmp_path: Path) -> None:
    folder = copy(tmp_path / "m")
    edit_tensors(folder, lambda t: t.update({DOWN: torch.full_like(t[DOWN], 6e4)}))
    with pytest.raises(UserError, match=rf"answers are NaN or infinite in torch\.float16, from {BLOCK}\.mlp\.down_proj on"):
        load(source(folder, dtype="float16"), CPU)


def test_tokens_and_template_may_be_given(tmp_path: Path) -> None:
    folder = copy(tmp_path / "m")
    template = tmp_path / "t.jinja"
    (folder / "chat_template.jinja").rename(template)
    edit_json(folder / "tokenizer_config.json", no("eos_token", "pad_token"))
    edit_json(folder / "generation_config.json", no("eos_token_id", "pad_token_id"))
    given = source(folder, chat_template=str(template), end_token="<|im_end|>", pad_token="<pad>")
    found, plain = load(given, CPU), load(source(copy(tmp_path / "plain")), CPU)
    asked = [(d["image"], d["question"]) for d in documents(0, 8)]
    replies = [generate(m.model, m.processor, asked, 8, {"max_new_tokens": 16}) for m in (found, plain)]
    assert replies[0] == replies[1]
    assert found.model.generation_config.eos_token_id == 1
    assert given.choices()["end_token"] == "<|im_end|>"
    with pytest.raises(UserError, match=r"model\.end_token='</nothing>' is no token"):
        describe(source(folder, end_token="</nothing>"))


def test_of_several_end_tokens_the_one_that_the_template_writes_ends_an_answer(tmp_path: Path) -> None:
    folder = copy(tmp_path / "m")
    edit_json(folder / "generation_config.json", lambda c: c.update(eos_token_id=[1, 6]))
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(eos_token="<img>"))  # the template writes <|im_end|>
    several, plain = (load(source(f), CPU) for f in (folder, copy(tmp_path / "plain")))
    examples = [Example(d["sample_id"], d["image"], d["question"], d["answer"]) for d in documents(0, 8)]
    found, expected = (encode(m.processor, examples).inputs["input_ids"] for m in (several, plain))
    assert torch.equal(found, expected)
    packed, other = (next(packed_batches(m.processor, examples, 8)).inputs["input_ids"] for m in (several, plain))
    assert torch.equal(packed, other)
    asked = [(e.image, e.question) for e in examples]
    first, second = (generate(m.model, m.processor, asked, 8, {"max_new_tokens": 16}) for m in (several, plain))
    assert first == second


def test_a_beginning_that_the_template_writes_is_not_written_twice(tmp_path: Path) -> None:
    """Gemma's and Llama's templates begin with the token that their tokenizers begin texts with."""
    from tokenizers.processors import TemplateProcessing

    folder = copy(tmp_path / "m")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text("<|vision_start|>" + template)
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(bos_token="<|vision_start|>"))
    loaded = describe(source(folder))
    tokenizer = loaded.processor.tokenizer
    begin = tokenizer.convert_tokens_to_ids("<|vision_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|vision_start|> $A", special_tokens=[("<|vision_start|>", begin)]
    )
    assert tokenizer("a b").input_ids[0] == begin
    examples = [Example(d["sample_id"], d["image"], d["question"], d["answer"]) for d in documents(0, 4)]
    for batch in (encode(loaded.processor, examples), next(packed_batches(loaded.processor, examples, 4))):
        assert ((batch.inputs["input_ids"] == begin).sum(1) == 1).all()


# The checkpoint is the model that was quantised.


def half_tied(folder: Path) -> None:
    """Tied at the top, not in the language model's part, and a head of its own in the file."""
    edit_json(
        folder / "config.json", lambda c: (c.update(tie_word_embeddings=True), c["text_config"].update(tie_word_embeddings=False))
    )
    edit_tensors(folder, lambda t: t.update({HEAD: t[EMBEDDING] * 1.5 + 0.01}))


def own_head(folder: Path) -> None:
    edit_json(
        folder / "config.json",
        lambda c: (c.update(tie_word_embeddings=False), c["text_config"].update(tie_word_embeddings=False)),
    )
    edit_tensors(folder, lambda t: t.update({HEAD: t[EMBEDDING] * 1.5}))


def wide_norms(folder: Path) -> None:
    """Some tensors in float32 where config.json says float16."""
    edit_tensors(folder, lambda t: t.update({NORM: t[NORM].float() * 1.0001, DOWN: t[DOWN].float() * 1.0001}))


def no_dtype(folder: Path) -> None:
    edit_json(folder / "config.json", no("dtype"))


@pytest.mark.parametrize("edit", [half_tied, own_head, wide_norms, no_dtype, lambda _: None])
def test_what_is_loaded_back_is_the_source_to_the_bit(edit: Edit, tmp_path: Path) -> None:
    folder = copy(tmp_path / "m")
    edit(folder)
    loaded = load(source(folder), CPU)
    save(tmp_path / "checkpoint", loaded, list_sites(loaded.model, "all"), {})
    back = mgvq.load(tmp_path / "checkpoint")
    check_same_model(loaded, {}, back, "it")
    docs = documents(1, 6)
    batch = encode(loaded.processor, [Example(d["sample_id"], d["image"], d["question"], d["answer"]) for d in docs])
    assert torch.equal(answer_logits(back, batch), answer_logits(loaded.model, batch))


def test_a_run_compares_the_checkpoint_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*arguments: Any, **settings: Any) -> Any:
        model = mgvq.load(*arguments, **settings)
        model.get_decoder().norm.weight.data.mul_(1.5)
        return model

    monkeypatch.setattr("mgvq.runs.execute.load_checkpoint", other)
    for method in ("full_precision", "rtn"):
        with pytest.raises(UserError, match="is not the model that was quantised: the logits of a few tokens differ by"):
            run(tmp_path / method, "tiny_internvl", f"method={method}")


def test_logits_that_are_no_numbers_are_equal_to_nothing() -> None:
    logits = torch.randn(2, 5)
    check_same_logits(logits, logits.clone(), exact=True, path="it")
    check_same_logits(logits, logits + 1e-5, exact=False, path="it")
    for found, exact in ((logits + 1e-5, True), (logits * float("nan"), False), (torch.full_like(logits, float("nan")), True)):
        with pytest.raises(UserError, match="is not the model"):
            check_same_logits(logits, found, exact=exact, path="it")


# What a table must say.


def test_a_constant_row_reaches_the_flags_of_a_run(tmp_path: Path) -> None:
    folder = copy(tmp_path / "m")
    edit_tensors(folder, lambda t: t[DOWN][3].fill_(0))
    flags = run(tmp_path, folder, "method=rtn", "budget.bits_per_weight=4.0").metrics()["flags"]
    assert flags == [f"constant:{BLOCK}.mlp.down_proj"]


def test_matrices_that_are_no_layers_are_flagged_with_their_share(tmp_path: Path) -> None:
    """Experts in one tensor are such matrices."""
    model = load(source(copy(tmp_path / "m")), CPU).model
    sites = list_sites(model, "all")
    assert left_out_flags(model, sites) == []
    mlp = model.get_submodule(f"{BLOCK}.mlp")
    size = sum(s.num_weights for s in sites if s.tower == "language" and s.block is not None)
    mlp.register_parameter("experts", torch.nn.Parameter(torch.randn(4, size // 8, 1)))
    (flag,) = left_out_flags(model, list_sites(model, "all"))
    assert flag == "left_out:language:33.3% of the blocks' weights"


def test_shipped_models_have_no_flags(loaded: Any) -> None:
    sites = list_sites(loaded.model, "all")
    assert left_out_flags(loaded.model, sites) == []


# Processor and model mean the same.

TILES = [[64, 64], [64, 128], [128, 64]]


def test_tiles_are_set_for_the_processor_and_the_model(tmp_path: Path) -> None:
    folder = copy(tmp_path / "m", "tiny_llava_onevision")
    given = load(source(folder, processor={"image_grid_pinpoints": TILES}), CPU)
    assert given.model.config.image_grid_pinpoints == given.processor.image_processor.image_grid_pinpoints == TILES
    wide = Example("wide", Image.new("RGB", (128, 64), (9, 200, 40)), "Is it ?", "no")
    assert torch.isfinite(answer_logits(given.model, encode(given.processor, [wide]))).all()
    save(tmp_path / "checkpoint", given, [], {})
    assert mgvq.load(tmp_path / "checkpoint").config.image_grid_pinpoints == TILES


def test_tiles_of_the_processor_alone_are_refused(tmp_path: Path) -> None:
    folder = copy(tmp_path / "m", "tiny_llava_onevision")
    edit_json(folder / "processor_config.json", lambda c: c["image_processor"].update(image_grid_pinpoints=TILES))
    with pytest.raises(UserError, match=r"image_grid_pinpoints=\[\[64, 64\].*its config\.json has.*Set both"):
        describe(source(folder))


def test_a_device_that_is_not_here_is_refused() -> None:
    assert find_device("cpu") == torch.device("cpu")
    for name in ("cuda:97", "gpu", "cuda:x", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(UserError, match=f"device={name}"):
            find_device(name)


# A question that cannot be asked costs that question.


def test_an_image_that_the_processor_refuses_costs_one_question(tmp_path: Path) -> None:
    loaded = load(source(copy(tmp_path / "m", "tiny_qwen2_vl")), CPU)
    asked: list[Any] = [(d["image"], d["question"]) for d in documents(0, 6)]
    plain = generate(loaded.model, loaded.processor, asked, 4, {"max_new_tokens": 16})
    strange = [asked[0], (Image.new("RGB", (900, 3)), "Is it ?"), *asked[1:], (asked[0][0], "is <|image_pad|> one ?")]
    replies = generate(loaded.model, loaded.processor, strange, 4, {"max_new_tokens": 16})
    assert [replies[0], *replies[2:-1]] == plain
    assert replies[1].text == replies[-1].text == ""
    assert "aspect ratio" in str(replies[1].refused)
    assert "special token" in str(replies[-1].refused)


def test_an_answer_of_numbers_that_are_none_is_told(tmp_path: Path) -> None:
    loaded = load(source(copy(tmp_path / "m")), CPU)
    asked: list[Any] = [(d["image"], d["question"]) for d in documents(0, 6)]
    loaded.model.get_decoder().norm.weight.data[0] = float("nan")
    assert generate(loaded.model, loaded.processor, asked, 4, {"max_new_tokens": 4}) == [Reply("", finite=False)] * 6


def test_longer_texts_than_positions_are_refused_everywhere(tmp_path: Path) -> None:
    folder = copy(tmp_path / "m")
    edit_json(folder / "config.json", lambda c: c["text_config"].update(max_position_embeddings=60))
    loaded = load(source(folder), CPU)
    doc = documents(0, 1)[0]
    long = [Example("long", doc["image"], doc["question"] * 20, doc["answer"])]
    for batch in (next(batches(loaded.processor, long, 1)), next(packed_batches(loaded.processor, long, 1))):
        with pytest.raises(UserError, match=r"a sample has \d+ tokens, and .* was made for 60 positions"):
            answer_logits(loaded.model, batch)
    (reply,) = generate(loaded.model, loaded.processor, [(doc["image"], doc["question"] * 20)], 1, {"max_new_tokens": 4})
    assert "60 positions" in str(reply.refused)


def test_a_model_of_text_is_counted_without_its_weights() -> None:
    with composer() as compose:
        chosen = build(compose("model=smollm2"), "model")
    model = empty_model(chosen)
    assert model is not None
    assert sum(p.numel() for p in model.parameters()) == 134_515_008  # what its card says: 135 M


def test_a_family_may_be_declared(tmp_path: Path) -> None:
    folder = copy(tmp_path / "m")
    found = load(source(folder), CPU).model
    towers = {tower: list(names) for tower, names in find_towers(found).modules.items()}
    alone = load(
        source(folder, family={"towers": towers, "shared_inputs": {"k_proj": "kv", "v_proj": "kv"}, "packable": False}), CPU
    )
    assert find_towers(alone.model) == find_towers(found)
    reads = {site.kind: site.reads.rpartition(".")[2] for site in list_sites(alone.model, "language")}
    assert (reads["q_proj"], reads["k_proj"], reads["v_proj"], reads["up_proj"]) == ("q_proj", "kv", "kv", "up_proj")
    assert can_pack(found)
    assert not can_pack(alone.model)
    save(tmp_path / "checkpoint", alone, [], {})
    back = mgvq.load(tmp_path / "checkpoint")
    assert list_sites(back, "all") == list_sites(alone.model, "all")
    for family, named in (
        ({"towers": {"language": ["model.nowhere"]}}, "names model.nowhere, which it does not have"),
        ({"towers": {"eyes": ["x"]}}, "has no eyes"),
        ({"towers": {"vision": ["x"]}}, "must name the modules of the language tower"),
        ({"twoers": {}}, "has no twoers"),
    ):
        with pytest.raises(UserError, match=named):
            list_sites(load(source(folder, family=family), CPU).model, "all")
