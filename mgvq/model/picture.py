"""What all questions about a picture have in common: the prompt up to the picture's end."""

from collections.abc import Sequence
from typing import Any

from PIL.Image import Image
from torch import Tensor

from mgvq.model.encode import chat_prompt


def split_prompt(processor: Any, question: str) -> tuple[str, str]:
    """The chat prompt up to its image token, and what follows: together the text up to where the answer begins."""
    token = processor.tokenizer.image_token
    before, behind = chat_prompt(processor, question).rsplit(token, 1)
    return before + token, behind


def prefix_inputs(processor: Any, images: Sequence[Image], prefixes: Sequence[str]) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Of prompts that end with their image: what the processor makes of them, padded on the left, and the tokens of each."""
    inputs = processor(images=list(images), text=list(prefixes), return_tensors="pt", padding=True)
    lengths = inputs["attention_mask"].sum(1).tolist()
    return dict(inputs), [ids[len(ids) - n :].tolist() for ids, n in zip(inputs["input_ids"], lengths, strict=True)]


def tokens(tokenizer: Any, text: str) -> list[int]:
    """Of a part of a prompt that begins behind an image or another special token, so that it can be cut off there."""
    return tokenizer(text, add_special_tokens=False).input_ids
