"""A model with its processor, loaded offline where the files are local."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from mgvq.model.source import Source


@dataclass(frozen=True)
class Loaded:
    """`stored_dtype` is the width that the source stores its weights in; what is not quantised is stored so again."""

    model: PreTrainedModel
    processor: Any
    stored_dtype: torch.dtype


def load(source: Source, device: torch.device) -> Loaded:
    """The model in `source.dtype` in evaluation mode, without gradients; the processor pads on the left.

    Raises UserError as `Source.identity` does.
    """
    source.identity()
    where = {"revision": source.revision} if source.folder is None else {"local_files_only": True}
    model = AutoModelForImageTextToText.from_pretrained(source.path, dtype=getattr(torch, source.dtype), **where)
    stored = AutoConfig.from_pretrained(source.path, **where).dtype
    assert stored is None or isinstance(stored, torch.dtype)
    model = model.eval().requires_grad_(False)
    model.to(device)  # type: ignore[arg-type]
    return Loaded(model, load_processor(source.path, **where), stored or torch.float32)


def load_processor(path: str, **where: Any) -> Any:
    """The processor, set to pad on the left as generation needs it."""
    processor = AutoProcessor.from_pretrained(path, **where)
    processor.tokenizer.padding_side = "left"
    return processor
