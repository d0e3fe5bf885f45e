"""A model with its processor, loaded offline where the files are local."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from mgvq.errors import UserError
from mgvq.model.answers import answer_logits
from mgvq.model.encode import Example, encode, image_token_id
from mgvq.model.source import Source
from mgvq.model.text import Passage, encode_text, is_text_only
from mgvq.types import Batch


@dataclass(frozen=True)
class Loaded:
    """`stored_dtype` is the width that the source stores its weights in; what is not quantised is stored so again.

    `processor` is the tokenizer where the model reads nothing but text.
    """

    model: PreTrainedModel
    processor: Any
    stored_dtype: torch.dtype


def load(source: Source, device: torch.device) -> Loaded:
    """The model in `source.dtype` in evaluation mode, without gradients; the processor pads on the left.

    Raises UserError as `Source.identity` does, and where teacher forcing or the image mask would be wrong (`_check`).
    """
    source.identity()
    path = str(source.folder or source.path)
    where = {"revision": source.revision} if source.folder is None else {"local_files_only": True}
    config = AutoConfig.from_pretrained(path, **where)
    model = model_class(config).from_pretrained(path, dtype=getattr(torch, source.dtype), **where)
    stored = config.dtype
    assert stored is None or isinstance(stored, torch.dtype)
    model = model.eval().requires_grad_(False)
    model.to(device)  # type: ignore[arg-type]
    loaded = Loaded(model, load_processor(path, **where), stored or torch.float32)
    _check(loaded, source.path)
    return loaded


def model_class(config: PretrainedConfig) -> Any:
    """The auto class of transformers that makes a model of it."""
    return AutoModelForCausalLM if is_text_only(config) else AutoModelForImageTextToText


def _check(loaded: Loaded, path: str) -> None:
    """Model and processor mean the same image token, and no answer token sees later ones (as in a bidirectional prefix)."""
    model, processor = loaded.model, loaded.processor
    expected = getattr(model.config, "image_token_id", None)
    if expected is not None and image_token_id(processor) != expected:
        raise UserError(
            f"{path}: the model puts image features in the places of token {expected}, its processor "
            f"({type(processor).__name__}) marks them by token {image_token_id(processor)}. Processor and config.json do not fit."
        )
    grey = Image.new("RGB", (64, 64), (128, 128, 128))

    def asked(answer: str) -> Batch:
        if is_text_only(model.config):
            return encode_text(processor, [Passage("", f"Is it? {answer}")])
        return encode(processor, [Example("", grey, "Is it ?", answer)])

    with torch.inference_mode():
        yes, no = (answer_logits(model, asked(answer).to(model.device))[0] for answer in ("yes", "no"))
    if (yes - no).abs().max() > 0.05 * yes.std():
        raise UserError(
            f"{path}: {type(model).__name__} predicts the first token of an answer from the whole answer: its tokens see later "
            "ones, so that calibration and teacher-forced scores would be those of a model that is shown what it is asked for."
        )


def load_processor(path: str, **where: Any) -> Any:
    """The processor, set to pad on the left as generation needs it; the tokenizer of a model that reads nothing but text."""
    if is_text_only(AutoConfig.from_pretrained(path, **where)):
        return AutoTokenizer.from_pretrained(path, padding_side="left", **where)
    processor = AutoProcessor.from_pretrained(path, **where)
    processor.tokenizer.padding_side = "left"
    return processor
