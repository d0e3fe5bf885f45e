"""InternVL2's repositories in the layout of transformers' InternVL, once and before any run; none of their code is run.

    python -m mgvq.model.internvl2 ORIGINAL NATIVE OUT

Their remote code needs transformers of at most 4.49, and has no processor. The modules are those of InternVL 2.5, which
transformers has: an InternViT, a projector of two layers, a Llama (InternLM2) whose q, k and v are one matrix. So the weights
come from ORIGINAL, and tokenizer, processor and chat template from NATIVE, an InternVL 2.5 of the same vocabulary. What stands
for what is as in transformers' convert_internvl_weights_to_hf.py, which takes 2.5 and 3.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoProcessor, GenerationConfig, InternVLConfig

from mgvq.checks import told_as
from mgvq.errors import UserError
from mgvq.model.encode import image_token_id
from mgvq.model.files import read_json
from mgvq.model.terms import bring_terms

_RENAMED = (
    (r"^vision_model\.", "model.vision_tower."),
    (r"embeddings\.class_embedding", "embeddings.cls_token"),
    (r"embeddings\.position_embedding", "embeddings.position_embeddings"),
    (r"embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"encoder\.layers\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.", ".attention."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls(\d)$", r".lambda_\1"),
    (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
    (r"^language_model\.output\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"\.tok_embeddings\.", ".embed_tokens."),
    (r"\.attention\.wo\.", ".self_attn.o_proj."),
    (r"\.attention\.wqkv\.", ".self_attn.wqkv."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
)
_TEXT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "max_position_embeddings", "rms_norm_eps", "rope_theta", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
_VISION = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
           "hidden_act", "layer_norm_eps", "norm_type")  # fmt: skip


def convert(original: Path, native: Path, out: Path) -> None:
    """Write `out`, a folder in the hub's format, whole or not at all; `original` and `native` are such folders too.

    Terms and model card of `original` go along. Raises UserError where `original` is not of InternVL2's layout with an InternLM2,
    where `out` exists, and for a file that cannot be read or written.
    """
    if out.exists():
        raise UserError(f"{out} exists; give a folder that does not.")
    described = _read(original)
    llm = described.get("llm_config", {})
    if described.get("model_type") != "internvl_chat" or llm.get("architectures") != ["InternLM2ForCausalLM"]:
        raise UserError(
            f"{original}: model_type {described.get('model_type')!r} with {llm.get('architectures')} is not InternVL2 with an "
            "InternLM2, which is what is converted here. For others take a repository whose name ends in -hf."
        )
    with told_as(f"{native} has no processor that can be read", "Give the folder of the same model whose name ends in -hf."):
        processor = AutoProcessor.from_pretrained(native, local_files_only=True)
    with told_as(f"{original} cannot be converted into {out}", "Nothing is left there: mend it, and start the same command."):
        config = _config(described, image_token_id(processor))
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            made = Path(scratch) / out.name
            made.mkdir()
            _write_weights(original, config, made)
            config.save_pretrained(made)
            # The end of a turn, where the language model's own config names the end of a text.
            ends, pad = processor.tokenizer.convert_tokens_to_ids("<|im_end|>"), processor.tokenizer.pad_token_id
            GenerationConfig(eos_token_id=ends, pad_token_id=pad, do_sample=False).save_pretrained(made)
            processor.save_pretrained(made)
            bring_terms(original, made)
            made.rename(out)


def _write_weights(original: Path, config: InternVLConfig, out: Path) -> None:
    files = sorted(original.glob("*.safetensors"))
    places: dict[str, str] = {}
    total = 0
    for number, file in enumerate(files, start=1):
        tensors = dict(_converted(file, config))
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, out / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file() or not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no model: it needs config.json and safetensors files.")
    return read_json(file)


def _config(described: Mapping[str, Any], image_token: int) -> InternVLConfig:
    llm, vision = described["llm_config"], described["vision_config"]
    if described.get("ps_version") != "v2" or described.get("select_layer", -1) != -1:
        raise UserError("only pixel shuffle v2 of the last vision layer is converted; ps_version or select_layer says otherwise.")
    side = vision["image_size"] // vision["patch_size"]
    scaling = llm.get("rope_scaling")
    return InternVLConfig(
        text_config={
            "model_type": "llama",
            **{key: llm[key] for key in _TEXT if key in llm},
            "attention_bias": llm.get("bias", False),
            **({"rope_scaling": {"rope_type": scaling["type"], "factor": scaling["factor"]}} if scaling else {}),
        },
        vision_config={
            **{key: vision[key] for key in _VISION if key in vision},
            "attention_bias": vision["qkv_bias"],
            "use_qk_norm": vision["qk_normalization"],
        },
        image_token_id=image_token,
        image_seq_length=int(side**2 * described["downsample_ratio"] ** 2),
        downsample_ratio=described["downsample_ratio"],
        tie_word_embeddings=False,
        architectures=["InternVLForConditionalGeneration"],
        dtype=described.get("torch_dtype", "bfloat16"),
    )


def _converted(file: Path, config: InternVLConfig) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, "pt") as stored:
        for old in stored.keys():  # noqa: SIM118 (it is no dictionary)
            name, tensor = old, stored.get_tensor(old)
            for pattern, new in _RENAMED:
                name = re.sub(pattern, new, name)
            if ".self_attn.wqkv." in name:
                parts = _split_wqkv(tensor, config)
            elif ".attention.qkv." in name:
                parts = dict(zip("qkv", tensor.chunk(3), strict=True))
            else:
                yield name, tensor.contiguous()
                continue
            for letter, part in parts.items():
                yield re.sub(r"\.w?qkv\.", f".{letter}_proj.", name), part.contiguous()


def _split_wqkv(tensor: Tensor, config: InternVLConfig) -> dict[str, Tensor]:
    """The q, k and v of InternLM2's one matrix: for each key-value head the rows of its query heads, its keys, its values."""
    text: Any = config.text_config
    groups = text.num_attention_heads // text.num_key_value_heads
    heads = tensor.unflatten(0, (text.num_key_value_heads, groups + 2, -1))
    return {"q": heads[:, :groups].flatten(0, 2), "k": heads[:, groups].flatten(0, 1), "v": heads[:, groups + 1].flatten(0, 1)}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m mgvq.model.internvl2")
    parser.add_argument("original", type=Path, help="folder with the files of an InternVL2 repository")
    parser.add_argument("native", type=Path, help="folder with the processor of an InternVL2_5-*-MPO-hf repository")
    parser.add_argument("out", type=Path, help="folder to write")
    arguments = parser.parse_args()
    try:
        convert(arguments.original, arguments.native, arguments.out)
    except UserError as error:
        print(f"mgvq.model.internvl2: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"mgvq-run model.path={arguments.out} with the model's own settings, such as model=internvl2_8b")


if __name__ == "__main__":
    main()
