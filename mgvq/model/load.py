"""A model with its processor, loaded offline where the files are local."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from mgvq.errors import UserError
from mgvq.model.answers import answer_logits
from mgvq.model.encode import Example, encode, image_token_id
from mgvq.model.source import Source


@dataclass(frozen=True)
class Loaded:
    """`stored_dtype` is the width that the source stores its weights in; what is not quantised is stored so again."""

    model: PreTrainedModel
    processor: Any
    stored_dtype: torch.dtype


def load(source: Source, device: torch.device) -> Loaded:
    """The model in `source.dtype` in evaluation mode, without gradients; the processor pads on the left.

    Raises UserError as `Source.identity` does, and where teacher forcing or the image mask would be wrong (`_check`).
    """
    source.identity()
    where = {"revision": source.revision} if source.folder is None else {"local_files_only": True}
    model = AutoModelForImageTextToText.from_pretrained(source.path, dtype=getattr(torch, source.dtype), **where)
    stored = AutoConfig.from_pretrained(source.path, **where).dtype
    assert stored is None or isinstance(stored, torch.dtype)
    model = model.eval().requires_grad_(False)
    model.to(device)  # type: ignore[arg-type]
    loaded = Loaded(model, load_processor(source.path, **where), stored or torch.float32)
    _check(loaded, source.path)
    return loaded


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
    with torch.inference_mode():
        yes, no = (
            answer_logits(model, encode(processor, [Example("", grey, "Is it ?", answer)]).to(model.device))[0]
            for answer in ("yes", "no")
        )
    if (yes - no).abs().max() > 0.05 * yes.std():
        raise UserError(
            f"{path}: {type(model).__name__} predicts the first token of an answer from the whole answer: its tokens see later "
            "ones, so that calibration and teacher-forced scores would be those of a model that is shown what it is asked for."
        )


def load_processor(path: str, **where: Any) -> Any:
    """The processor, set to pad on the left as generation needs it."""
    processor = AutoProcessor.from_pretrained(path, **where)
    processor.tokenizer.padding_side = "left"
    return processor
