"""InternVL2's layout, written from a native model by rules of its own, is converted back to that model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, InternVLConfig

from mgvq.errors import UserError
from mgvq.model.internvl2 import convert
from mgvq.model.load import load
from mgvq.model.source import SHIPPED, Source

NATIVE = SHIPPED / "tiny_internvl"
LLM = {"architectures": ["InternLM2ForCausalLM"], "vocab_size": 448, "hidden_size": 48, "intermediate_size": 80, "bias": False,
       "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1000000,
       "rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 512, "bos_token_id": None,
       "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
VIT = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64,
       "patch_size": 8, "hidden_act": "gelu", "layer_norm_eps": 1e-6}  # fmt: skip
SMALL = {**VIT, "qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm"}  # InternViT-300M
LARGE = {**VIT, "qkv_bias": False, "qk_normalization": True, "norm_type": "rms_norm"}  # InternViT-6B


def native_model(vision: dict[str, Any]) -> torch.nn.Module:
    own = {"attention_bias": vision["qkv_bias"], "use_qk_norm": vision["qk_normalization"], "norm_type": vision["norm_type"]}
    config = InternVLConfig(
        text_config={
            "model_type": "llama",
            **{k: v for k, v in LLM.items() if k not in ("architectures", "bias", "rope_scaling")},
        },
        vision_config={**VIT, **own},
        image_token_id=4,
        image_seq_length=16,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return model


def in_their_layout(model: torch.nn.Module, vision: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Module by module, as InternVL2's code names them."""
    old: dict[str, torch.Tensor] = {}

    def put(name: str, module: torch.nn.Module) -> None:
        old.update({f"{name}.{part}": p.clone() for part, p in module.named_parameters()})

    tower, text, projector = model.model.vision_tower, model.model.language_model, model.model.multi_modal_projector
    old["vision_model.embeddings.class_embedding"] = tower.embeddings.cls_token.clone()
    old["vision_model.embeddings.position_embedding"] = tower.embeddings.position_embeddings.clone()
    put("vision_model.embeddings.patch_embedding", tower.embeddings.patch_embeddings.projection)
    for i, layer in enumerate(tower.encoder.layer):
        name, attention = f"vision_model.encoder.layers.{i}", layer.attention
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        old[f"{name}.attn.qkv.weight"] = torch.cat([p.weight for p in projections])
        if vision["qkv_bias"]:
            old[f"{name}.attn.qkv.bias"] = torch.cat([p.bias for p in projections])
        if vision["qk_normalization"]:
            put(f"{name}.attn.q_norm", attention.q_norm)
            put(f"{name}.attn.k_norm", attention.k_norm)
        put(f"{name}.attn.proj", attention.projection_layer)
        put(f"{name}.norm1", layer.layernorm_before)
        put(f"{name}.norm2", layer.layernorm_after)
        put(f"{name}.mlp", layer.mlp)
        old[f"{name}.ls1"], old[f"{name}.ls2"] = layer.lambda_1.clone(), layer.lambda_2.clone()
    for number, module in ((0, projector.layer_norm), (1, projector.linear_1), (3, projector.linear_2)):
        put(f"mlp1.{number}", module)
    put("language_model.model.tok_embeddings", text.embed_tokens)
    put("language_model.model.norm", text.norm)
    put("language_model.output", model.lm_head)
    for i, layer in enumerate(text.layers):
        name, size = f"language_model.model.layers.{i}", 48 // 6
        q, k, v = (getattr(layer.self_attn, f"{letter}_proj").weight.split(size) for letter in "qkv")  # by head
        rows = [row for head in range(2) for row in (*q[3 * head : 3 * head + 3], k[head], v[head])]
        old[f"{name}.attention.wqkv.weight"] = torch.cat(rows)
        put(f"{name}.attention.wo", layer.self_attn.o_proj)
        for letter, kind in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            put(f"{name}.feed_forward.{letter}", getattr(layer.mlp, kind))
        put(f"{name}.attention_norm", layer.input_layernorm)
        put(f"{name}.ffn_norm", layer.post_attention_layernorm)
    return old


def write_original(original: Path, model: torch.nn.Module, vision: dict[str, Any]) -> None:
    """Its repository, with terms."""
    original.mkdir()
    tensors = in_their_layout(model, vision)
    for number in (1, 2):
        part = dict(list(tensors.items())[number - 1 :: 2])
        save_file(part, original / f"model-0000{number}-of-00002.safetensors", metadata={"format": "pt"})
    described = {"model_type": "internvl_chat", "llm_config": LLM, "vision_config": vision, "ps_version": "v2",
                 "select_layer": -1, "downsample_ratio": 0.5, "torch_dtype": "float32"}  # fmt: skip
    (original / "config.json").write_text(json.dumps(described))
    (original / "LICENSE").write_text("what may be done with it")
    (original / "README.md").write_text("---\nlicense: mit\n---\n")


@pytest.mark.parametrize("vision", [SMALL, LARGE], ids=["300M", "6B"])
def test_every_tensor_comes_to_its_place_and_the_model_runs(vision: dict[str, Any], tmp_path: Path) -> None:
    model, original = native_model(vision), tmp_path / "original"
    write_original(original, model, vision)
    convert(original, NATIVE, tmp_path / "out")
    source = Source(name="internvl2", path=str(tmp_path / "out"), revision=None, dtype="float32")
    found = load(source, torch.device("cpu"))
    assert (found.licence, [file.name for file in found.terms]) == ("mit", ["LICENSE"])
    expected = model.state_dict()
    assert found.model.state_dict().keys() == expected.keys()
    assert [name for name, tensor in found.model.state_dict().items() if not torch.equal(tensor, expected[name])] == []
    assert found.model.config.text_config.rope_parameters["rope_type"] == "dynamic"
    assert found.model.generation_config.eos_token_id == AutoProcessor.from_pretrained(NATIVE).tokenizer.eos_token_id


def test_a_conversion_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    """The same command does it once the file is mended."""
    original, out = tmp_path / "original", tmp_path / "out"
    write_original(original, native_model(SMALL), SMALL)
    shard = original / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"original cannot be converted into \S+out \("):
        convert(original, NATIVE, out)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]
    shard.write_bytes(content)
    convert(original, NATIVE, out)
    assert (out / "model-00002-of-00002.safetensors").is_file()


def test_what_is_no_internvl2_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model_type 'internvl' with None is not InternVL2"):
        convert(NATIVE, NATIVE, tmp_path / "out")
    with pytest.raises(UserError, match="exists"):
        convert(NATIVE, NATIVE, tmp_path)


def test_a_processor_that_is_not_there_is_told(tmp_path: Path) -> None:
    original = tmp_path / "original"
    original.mkdir()
    config = {"model_type": "internvl_chat", "llm_config": {"architectures": ["InternLM2ForCausalLM"]}}
    (original / "config.json").write_text(json.dumps(config))
    save_file({"one": torch.zeros(1)}, original / "model.safetensors")
    with pytest.raises(UserError, match="none has no processor that can be read"):
        convert(original, tmp_path / "none", tmp_path / "out")
    with pytest.raises(UserError, match=r"cannot be converted into .*vision_config"):
        convert(original, NATIVE, tmp_path / "out")
