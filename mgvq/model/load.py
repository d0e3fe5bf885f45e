"""A model with its processor, loaded offline where the files are local."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from mgvq.errors import UserError
from mgvq.model.encode import image_token_id
from mgvq.model.source import Source


@dataclass(frozen=True)
class Loaded:
    """`stored_dtype` is the width that the source stores its weights in; what is not quantised is stored so again."""

    model: PreTrainedModel
    processor: Any
    stored_dtype: torch.dtype


def load(source: Source, device: torch.device) -> Loaded:
    """The model in `source.dtype` in evaluation mode, without gradients; the processor pads on the left.

    Raises UserError as `Source.identity` does, and where model and processor mean different image tokens.
    """
    source.identity()
    where = {"revision": source.revision} if source.folder is None else {"local_files_only": True}
    model = AutoModelForImageTextToText.from_pretrained(source.path, dtype=getattr(torch, source.dtype), **where)
    stored = AutoConfig.from_pretrained(source.path, **where).dtype
    assert stored is None or isinstance(stored, torch.dtype)
    model = model.eval().requires_grad_(False)
    model.to(device)  # type: ignore[arg-type]
    processor = load_processor(source.path, **where)
    expected = getattr(model.config, "image_token_id", None)
    if expected is not None and image_token_id(processor) != expected:
        raise UserError(
            f"{source.path}: the model puts image features in the places of token {expected}, its processor "
            f"({type(processor).__name__}) marks them by token {image_token_id(processor)}. Processor and config.json do not fit."
        )
    return Loaded(model, processor, stored or torch.float32)


def load_processor(path: str, **where: Any) -> Any:
    """The processor, set to pad on the left as generation needs it."""
    processor = AutoProcessor.from_pretrained(path, **where)
    processor.tokenizer.padding_side = "left"
    return processor
