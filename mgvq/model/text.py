"""Passages of text as inputs of a model: every token but the first is to be predicted from those before it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from mgvq.types import Batch


@dataclass(frozen=True, slots=True)
class Passage:
    """A sample of text without an image or a question."""

    sample_id: str
    text: str


def is_text_only(config: PretrainedConfig) -> bool:
    """Whether this is a language model by itself, not a model of several towers that has one."""
    return config.get_text_config(decoder=True) is config


def encode_text(processor: Any, passages: Sequence[Passage]) -> Batch:
    """One row a passage, padded on the left, without special tokens. `processor` may be a tokenizer."""
    tokenizer = getattr(processor, "tokenizer", processor)
    encoded = tokenizer([p.text for p in passages], return_tensors="pt", padding=True, add_special_tokens=False)
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    valid = inputs["attention_mask"].bool()
    image_mask, loss_mask = torch.zeros_like(valid), valid & (valid.cumsum(1) > 1)
    return Batch(inputs, image_mask, loss_mask, valid, tuple(p.sample_id for p in passages))


def text_batches(processor: Any, passages: Sequence[Passage], size: int) -> Iterator[Batch]:
    """Passages of like length together, so that little is padded; sample ids tell which row is which."""
    order = sorted(passages, key=lambda p: (len(p.text), p.sample_id))
    for at in range(0, len(order), size):
        yield encode_text(processor, order[at : at + size])
