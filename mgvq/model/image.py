"""What all questions about an image have in common: the prompt up to the image's end."""

from collections.abc import Sequence
from typing import Any

from PIL.Image import Image
from torch import Tensor

from mgvq.model.chat import begins_itself
from mgvq.model.encode import chat_prompt

Question = tuple[Image | tuple[Image, ...], str]  # one image, or several before the text


class Unaskable(ValueError):
    """A question whose image cannot be read. It costs that question, not the evaluation."""


def split_prompt(processor: Any, question: str) -> tuple[str, str]:
    """The chat prompt up to its image token, and what follows: together the text up to where the answer begins."""
    token = processor.image_token
    before, behind = chat_prompt(processor, question).rsplit(token, 1)
    return before + token, behind


def prefix_inputs(processor: Any, questions: Sequence[Question]) -> tuple[dict[str, Tensor], list[list[int]]]:
    """What the processor makes of the prompts up to their images' ends, padded on the left, and the tokens of each.

    Raises ValueError where that and the tokens of the rest are not the whole prompt, as the first question has it.
    """
    image, question = questions[0]
    start, rest = split_prompt(processor, question)
    own = begins_itself(processor, start)
    (whole,) = processor(images=[[image]], text=[start + rest], return_tensors="pt", **own)["input_ids"].tolist()
    prefixes = [split_prompt(processor, text)[0] for _, text in questions]
    inputs = processor(images=[[image] for image, _ in questions], text=prefixes, return_tensors="pt", padding=True, **own)
    lengths = inputs["attention_mask"].sum(1).tolist()
    ids = [row[len(row) - n :].tolist() for row, n in zip(inputs["input_ids"], lengths, strict=True)]
    if ids[0] + tokens(processor.tokenizer, rest) != whole:
        raise ValueError(
            f"the prompt {start + rest!r} is not what the processor makes of it: {processor.tokenizer.decode(whole)!r}"
        )
    return dict(inputs), ids


def tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a part of a prompt that begins behind an image or another special token, so that it can be cut off there."""
    return tokenizer(text, add_special_tokens=False).input_ids
