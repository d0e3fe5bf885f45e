"""Questions about pictures as inputs of a model: chat template, processor, left padding, masks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image

from mgvq.errors import UserError
from mgvq.types import Batch


@dataclass(frozen=True, slots=True)
class Example:
    """One question with its right answer; `image` may be shared between examples."""

    sample_id: str
    image: Image
    question: str
    answer: str


def chat_prompt(processor: Any, question: str, num_images: int = 1) -> str:
    """The text up to where the answer begins, with the images before the question."""
    content = [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)


def image_token_id(processor: Any) -> int:
    """The token whose places the features of an image take. Raises UserError where the processor names none."""
    # Gemma 3's processor means by its own image token the one before the image; its tokenizer knows better.
    for names_it in (processor.tokenizer, processor):
        if (found := getattr(names_it, "image_token_id", None)) is not None:
            return found
    raise UserError(
        f"{type(processor).__name__} and its tokenizer name no image token (image_token_id): no image mask without it."
    )


def encode(processor: Any, examples: Sequence[Example]) -> Batch:
    """One row an example: prompt, answer, end-of-sequence token; padded on the left.

    Raises UserError for a processor that adds to the text behind the answer (PaliGemma's).
    """
    tokenizer = processor.tokenizer
    prompts = [chat_prompt(processor, e.question) for e in examples]
    texts = [f"{p}{e.answer}{tokenizer.eos_token}" for p, e in zip(prompts, examples, strict=True)]
    inputs = processor(images=[[e.image] for e in examples], text=texts, return_tensors="pt", padding=True)
    valid = inputs["attention_mask"].bool()
    # Images add as many tokens to the prompt as to the whole, so the answer's length can be counted without them.
    whole = tokenizer(texts).input_ids
    lengths = [len(ids) - len(tokenizer(prompt).input_ids) for ids, prompt in zip(whole, prompts, strict=True)]
    for row, ids, length in zip(inputs["input_ids"].tolist(), whole, lengths, strict=True):
        if row[-length:] != ids[-length:]:
            raise UserError(
                f"{type(processor).__name__} ends the text in {tokenizer.decode(row[-length:])!r}, which is not the answer "
                f"{tokenizer.decode(ids[-length:])!r}: it adds something, and where the answer lies cannot be told."
            )
    places = torch.arange(valid.shape[1])
    loss_mask = places[None, :] >= valid.shape[1] - torch.tensor(lengths)[:, None]
    image_mask = inputs["input_ids"] == image_token_id(processor)
    return Batch(dict(inputs), image_mask, loss_mask, valid, tuple(e.sample_id for e in examples))


def batches(processor: Any, examples: Sequence[Example], size: int) -> Iterator[Batch]:
    """Examples of like length together, so that little is padded; sample ids tell which row is which."""
    order = sorted(examples, key=lambda e: (len(e.question.split()) + len(e.answer.split()), e.sample_id))
    for at in range(0, len(order), size):
        yield encode(processor, order[at : at + size])
