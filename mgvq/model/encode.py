"""Samples as inputs of a model: chat template, processor, left padding, masks."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image

from mgvq.errors import UserError
from mgvq.model.chat import Answer, Chat, Rendered, begins_itself, check_texts, end_token, write_chat
from mgvq.progress import Counted
from mgvq.types import Batch


@dataclass(frozen=True, slots=True)
class Example:
    """One question about one image, with its right answer."""

    sample_id: str
    image: Image  # may be the same object as that of other examples, which then share what the model sees of it
    question: str
    answer: str

    @property
    def images(self) -> tuple[Image, ...]:
        """The image, as the only one."""
        return (self.image,)

    @property
    def num_words(self) -> int:
        """The number of words of question and answer."""
        return len(self.question.split()) + len(self.answer.split())

    def render(self, processor: Any) -> Rendered:
        """The prompt, the answer and its end token. Raises UserError for a text with a special token in it."""
        check_texts(processor, self.sample_id, (self.question, self.answer))
        prompt = chat_prompt(processor, self.question)
        text = f"{prompt}{self.answer}{end_token(processor)}"
        return Rendered(text, (Answer(len(prompt), len(text), 1),))


Sample = Example | Chat


def chat_prompt(processor: Any, question: str, num_images: int = 1) -> str:
    """The text up to where the answer begins, with the images before the question."""
    content = [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": question}]
    return write_chat(processor, [{"role": "user", "content": content}], "", add_generation_prompt=True)


def image_token_id(processor: Any) -> int:
    """The token whose places the features of an image take. Raises UserError where the processor names none."""
    # Gemma 3's processor means by its own image token the one before the image; its tokenizer knows better.
    for names_it in (processor.tokenizer, processor):
        if (found := getattr(names_it, "image_token_id", None)) is not None:
            return found
    raise UserError(
        f"{type(processor).__name__} and its tokenizer name no image token (image_token_id): no image mask without it."
    )


def encode(processor: Any, samples: Sequence[Sample]) -> Batch:
    """One row a sample, as it renders itself; padded on the left. All samples show equally many images.

    Raises UserError as `Chat.render` does, and for a processor that adds to the text so that an answer is not where it should be
    (PaliGemma's, behind it).
    """
    rendered = [s.render(processor) for s in samples]
    inputs = _processed(processor, [r.text for r in rendered], [s.images for s in samples])
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    loss_mask = torch.zeros_like(valid)
    for mask, row, is_token, sample, text in zip(loss_mask, ids, valid, samples, rendered, strict=True):
        for place, expected in _answers(processor, sample, text, row[is_token].tolist()):
            if (written := row[place].tolist()) != expected:
                decode = processor.tokenizer.decode
                raise UserError(
                    f"{sample.sample_id}: {type(processor).__name__} has {decode(written)!r} in the place of the answer "
                    f"{decode(expected)!r}: it adds something, and where the answer lies cannot be told."
                )
            mask[place] = True
    return Batch(dict(inputs), ids == image_token_id(processor), loss_mask, valid, tuple(s.sample_id for s in samples))


def _processed(processor: Any, texts: Sequence[str], images: Sequence[Sequence[Image]]) -> Any:
    shown = [list(i) for i in images] if images[0] else None
    return processor(images=shown, text=list(texts), return_tensors="pt", padding=True, **begins_itself(processor, texts[0]))


def _answers(processor: Any, sample: Sample, rendered: Rendered, row: list[int]) -> Iterator[tuple[slice, list[int]]]:
    """Where each answer lies, counted from the end of the row, and its tokens. `row` is without padding."""
    text, tokenizer = rendered.text, processor.tokenizer
    settings = begins_itself(processor, text)
    whole = tokenizer(text, **settings).input_ids
    for answer in rendered.answers:
        prompt, begun = (tokenizer(text[:at], **settings).input_ids for at in (answer.start, answer.stop))
        expected = whole[len(prompt) : len(begun)]
        # Images add as many tokens to a part of the text as to the whole, so those before the answer need not be counted.
        start = len(prompt) - len(whole)
        if answer.num_images < len(sample.images):  # how many those behind it add, only a mark in the answer's place can tell
            marked = text[: answer.start] + tokenizer.eos_token + text[answer.start :]
            (other,) = _processed(processor, [marked], [sample.images])["input_ids"].tolist()
            start = next(place for place, (a, b) in enumerate(zip(row, other, strict=False)) if a != b) - len(row)
        yield slice(start, start + len(expected) or None), expected


def batches(processor: Any, samples: Sequence[Sample], size: int) -> Iterator[Batch]:
    """Samples with equally many images, and of like length, together, so that little is padded; ids tell which row is which."""
    order = sorted(samples, key=lambda s: (len(s.images), s.num_words, s.sample_id))
    alike = [list(samples) for _, samples in itertools.groupby(order, key=lambda s: len(s.images))]
    parts = [rows[at : at + size] for rows in alike for at in range(0, len(rows), size)]
    return Counted((encode(processor, part) for part in parts), len(parts))
