"""A real language model that was taught to read images: put together from what is installed and what ships.

    language model      a GGUF file of a Python package (model/gguf.py)
    vision tower        of a shipped small model, as it is
    projector           `adapters.safetensors`
    low-rank adapters   there too: `layers.N.KIND.A` (rank, in) and `.B` (out, rank); W becomes W + scale B A

The layout is InternVL's of transformers. Whoever asks first has it assembled; the sums are exact in float64, so that the bytes
are equal on every machine, and the SHA-256 of the weights is checked.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mgvq.digest import file_digest
from mgvq.errors import UserError
from mgvq.model.files import read_json
from mgvq.model.gguf import Gguf, unpacked
from mgvq.model.source import SHIPPED, Source
from mgvq.model.terms import bring_terms

if TYPE_CHECKING:
    from torch import Tensor

ADAPTERS = "adapters.safetensors"
# Tokens of the language model that no text holds take the places of the images: its tokenizer stays as it is.
MARKS = {
    "image_token": "<empty_output>",
    "context_image_token": "<empty_output>",
    "start_image_token": "<jupyter_output>",
    "end_image_token": "<jupyter_text>",
    "video_token": "<jupyter_script>",
}
# The chat format of the language model, without a system message.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<empty_output>' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Grafted(Source):
    """A source whose `path` is the folder of the adapters, and whose `revision` is the SHA-256 of the weights, put together."""

    language: Gguf  # the language model
    tower: str  # the shipped model whose vision tower it is
    cache: str  # the folder in which the model is put together

    is_made: ClassVar[bool] = True

    @property
    def on_hub(self) -> bool:
        """It is put together here."""
        return False

    def identity(self) -> str:
        """The revision, so that runs can be planned where the language model is not installed."""
        if self.revision is None:
            raise UserError(f"model {self.name} needs model.revision, the SHA-256 of its weights when they are put together.")
        return self.revision

    @property
    def folder(self) -> Path:
        """The model in the hub's format. Raises UserError where a part is missing, or the whole is not what the revision says."""
        return unpacked(Path(self.cache) / self.identity(), self._assemble)

    def check(self) -> None:
        """Raises UserError where the model is not put together yet, and its language model or its adapters are not here."""
        if not (Path(self.cache) / self.identity()).is_dir():
            self.language.check()
            _check_adapters(Path(self.path) / ADAPTERS)

    def _assemble(self, folder: Path) -> None:
        assemble(self.language.folder, SHIPPED / self.tower, Path(self.path) / ADAPTERS, folder)
        bring_terms(self.language.folder, folder)
        if (found := file_digest(folder / "model.safetensors")) != self.revision:
            shutil.rmtree(folder)
            raise UserError(
                f"model {self.name}: what {self.language.path}, {self.tower} and {self.path} make has the SHA-256 {found}, but "
                f"model.revision={self.revision}: one of the parts is another one. Get them again."
            )


def _check_adapters(adapters: Path) -> None:
    if not adapters.is_file():
        raise UserError(f"{adapters} is missing: it holds the projector and the adapters of the model. Get the repository again.")


def assemble(language: Path, tower: Path, adapters: Path, folder: Path) -> None:
    """Write the model and its processor, in bfloat16. Raises UserError where the adapters are missing or fit another model."""
    import torch
    from safetensors.torch import load_file, save_file

    _check_adapters(adapters)
    with_scale = _metadata(adapters)
    learned, words, sees = (load_file(file) for file in (adapters, language / "model.safetensors", tower / "model.safetensors"))
    merge(words, {name: t for name, t in learned.items() if name.startswith("layers.")}, float(with_scale["scale"]))
    tensors = {f"language_model.{name}": tensor for name, tensor in words.items()}
    tensors |= {name: tensor for name, tensor in sees.items() if name.startswith("vision_tower.")}
    tensors |= {
        name.replace("projector.", "multi_modal_projector.", 1): tensor
        for name, tensor in learned.items()
        if name.startswith("projector.")
    }
    folder.mkdir(parents=True)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config(language, tower).save_pretrained(folder)
    settings = {"eos_token_id": read_json(language / "config.json")["eos_token_id"], "do_sample": False}
    generation = json.dumps({**settings, "pad_token_id": settings["eos_token_id"]})
    (folder / "generation_config.json").write_text(generation, encoding="utf-8")
    processor(language, tower).save_pretrained(folder)


def merge(weights: "dict[str, Tensor]", adapters: "Mapping[str, Tensor]", scale: float) -> None:
    """Add `scale B A` to the weights of a Llama, in place.

    The products of numbers in bfloat16, and the sums of a few of them, are exact in float64 as long as their sizes are not
    farther apart than 2^35: no order of summation changes a bit. Raises UserError for adapters of other layers or shapes.
    """
    for name, down in adapters.items():
        if not name.endswith(".A"):
            continue
        _, number, kind, _ = name.split(".")
        part = "mlp" if kind in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        target = f"model.layers.{number}.{part}.{kind}.weight"
        up = adapters[name.removesuffix("A") + "B"]
        if target not in weights or weights[target].shape != (up.shape[0], down.shape[1]):
            raise UserError(
                f"the adapter {name} fits no layer of the language model: {target} is not there, or of another shape."
            )
        weight = weights[target]
        weights[target] = (weight.double() + scale * (up.double() @ down.double())).to(weight.dtype)


def config(language: Path, tower: Path) -> Any:
    """InternVL's configuration of the two towers."""
    from transformers import InternVLConfig, LlamaConfig

    words, sees = LlamaConfig.from_pretrained(language), InternVLConfig.from_pretrained(tower)
    return InternVLConfig(
        text_config=words,
        vision_config=sees.vision_config,
        image_token_id=tokenizer(language).convert_tokens_to_ids(MARKS["image_token"]),
        image_seq_length=sees.image_seq_length,
        downsample_ratio=sees.downsample_ratio,
        vision_feature_layer=sees.vision_feature_layer,
        projector_hidden_act=sees.projector_hidden_act,
        tie_word_embeddings=words.tie_word_embeddings,
        architectures=["InternVLForConditionalGeneration"],
        dtype="bfloat16",
    )


def tokenizer(language: Path) -> Any:
    """The language model's own, whose marks of images are known as such."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(language, padding_side="left", extra_special_tokens=MARKS, local_files_only=True)


def processor(language: Path, tower: Path) -> Any:
    """The image processor of the tower's model, with the language model's tokenizer and chat format."""
    from transformers import AutoProcessor
    from transformers.models.internvl.processing_internvl import InternVLProcessor

    sees = AutoProcessor.from_pretrained(tower, local_files_only=True)
    return InternVLProcessor(
        image_processor=sees.image_processor,
        tokenizer=tokenizer(language),
        video_processor=sees.video_processor,
        image_seq_length=sees.image_seq_length,
        chat_template=TEMPLATE,
    )


def _metadata(adapters: Path) -> Mapping[str, str]:
    from safetensors import safe_open

    with safe_open(adapters, "pt") as file:
        return file.metadata() or {}
