"""Passages of text as inputs of a model: every token of theirs is to be predicted from those before it, if there is one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mgvq.errors import UserError
from mgvq.progress import Counted
from mgvq.types import Batch


@dataclass(frozen=True, slots=True)
class Passage:
    """A sample of text without an image or a question."""

    sample_id: str
    text: str


def encode_text(processor: Any, passages: Sequence[Passage]) -> Batch:
    """One row a passage, padded on the left. `processor` may be a tokenizer.

    Tokens that the tokenizer adds by itself (a beginning, as Gemma and Llama know texts with) are there and never scored, nor
    is the first token of a text that nothing stands before. Raises UserError where the added tokens cannot be told from the
    text's own.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    texts = [p.text for p in passages]
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    valid = inputs["attention_mask"].bool()
    loss_mask = torch.zeros_like(valid)
    plain = tokenizer(texts, add_special_tokens=False).input_ids
    for passage, row, is_token, scored, own in zip(passages, inputs["input_ids"], valid, loss_mask, plain, strict=True):
        ids = row[is_token].tolist()
        first = next((n for n in range(len(ids) - len(own) + 1) if ids[n : n + len(own)] == own), None)
        if first is None:
            raise UserError(
                f"{passage.sample_id}: {type(tokenizer).__name__} makes other tokens of a text with those that it adds than "
                "without: which are the text's own cannot be told."
            )
        places = is_token.nonzero()[:, 0]
        scored[places[max(first, 1) : first + len(own)]] = True
    return Batch(inputs, torch.zeros_like(valid), loss_mask, valid, tuple(p.sample_id for p in passages))


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer adds by itself before and behind a text."""
    whole, own = (tokenizer("text", add_special_tokens=added).input_ids for added in (True, False))
    first = next((n for n in range(len(whole) - len(own) + 1) if whole[n : n + len(own)] == own), None)
    if first is None:
        raise UserError(f"{type(tokenizer).__name__} makes other tokens of a text with those that it adds than without.")
    return whole[:first], whole[first + len(own) :]


def text_batches(processor: Any, passages: Sequence[Passage], size: int) -> Iterator[Batch]:
    """Passages of like length together, so that little is padded; sample ids tell which row is which."""
    order = sorted(passages, key=lambda p: (len(p.text), p.sample_id))
    parts = [order[at : at + size] for at in range(0, len(order), size)]
    return Counted((encode_text(processor, part) for part in parts), len(parts))
