"""Conversations of texts and images, and what a processor's chat template makes of them."""

import re
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from PIL.Image import Image

from mgvq.errors import UserError


@dataclass(frozen=True, slots=True)
class Turn:
    """`role` is system, user or assistant; `parts` are its texts and images in their order."""

    role: str
    parts: tuple[str | Image, ...]

    @property
    def text(self) -> str:
        """The texts alone."""
        return "".join(part for part in self.parts if isinstance(part, str))

    def message(self) -> dict[str, Any]:
        """As chat templates read it."""
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in self.parts]
        return {"role": self.role, "content": content}


@dataclass(frozen=True, slots=True)
class Answer:
    """Characters `start` to `stop` (exclusive) of a rendered text; `num_images` stand before them."""

    start: int
    stop: int
    num_images: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text that a processor takes, each image still one token in it, and the answers in it."""

    text: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that ends with an answer. `sample_id` says where it comes from, in errors too."""

    sample_id: str
    turns: tuple[Turn, ...]

    @property
    def images(self) -> tuple[Image, ...]:
        """In the order in which they are shown."""
        return tuple(p for turn in self.turns for p in turn.parts if not isinstance(p, str))

    @property
    def num_words(self) -> int:
        """Of all turns; images do not count."""
        return sum(len(turn.text.split()) for turn in self.turns)

    def render(self, processor: Any) -> Rendered:
        """The last answer stands behind the generation prompt, where the model would write it; all before it is the template's.

        An answer goes from there to the end-of-sequence token. Where the template writes none, it ends before the white space
        that the template closes the turn with, and the last answer gets one: generation has to stop. Raises UserError where the
        template refuses the conversation, writes the answers elsewhere than behind the generation prompt (white space apart), or
        not at all, and where a text holds the image token.
        """
        end = processor.tokenizer.eos_token
        last = len(self.turns) - 1
        text, answers, num_images = self._written(processor, last, add_generation_prompt=True), [], 0
        for number, turn in enumerate(self.turns):
            num_images += sum(not isinstance(part, str) for part in turn.parts)
            if turn.role != "assistant":
                continue
            prompt, whole = self._written(processor, number, add_generation_prompt=True), self._written(processor, number + 1)
            start = _behind(prompt, whole)
            answer, found, _ = whole[start:].partition(end)
            answer = answer + end if found else answer.rstrip()
            if number == last:
                start, answer = len(text), answer.removesuffix(end) + end
                text += answer
            if not answer.removesuffix(end).strip() or text[start : start + len(answer)] != answer:
                raise UserError(
                    f"{self.sample_id}: no answer tokens. The chat template of {type(processor).__name__} should write "
                    f"{turn.text!r} behind {prompt[-40:]!r}, and writes {whole[-80:]!r}. Use the template that the "
                    "model was trained with (chat_template.jinja in its folder), or leave the row out."
                )
            answers.append(Answer(start, start + len(answer), num_images))
        token = getattr(processor, "image_token", None)
        if token is not None and text.count(token) != len(self.images):
            raise UserError(
                f"{self.sample_id}: {len(self.images)} images, but {text.count(token)} times {token!r} in what the chat template "
                f"of {type(processor).__name__} makes of it. Take {token!r} out of the texts, or mend the template."
            )
        return Rendered(text, tuple(answers))

    def _written(self, processor: Any, num_turns: int, **settings: Any) -> str:
        messages = [turn.message() for turn in self.turns[:num_turns]]
        try:
            return processor.apply_chat_template(messages, tokenize=False, **settings)
        except TemplateError as error:
            raise UserError(f"{self.sample_id}: the chat template of {type(processor).__name__} refuses it: {error}") from error


def _behind(prompt: str, whole: str) -> int:
    """Where `whole` goes on behind the prompt, or behind the same words with other white space between (LLaVA-OneVision's).

    The end of `whole` where it begins with neither.
    """
    if whole.startswith(prompt):
        return len(prompt)
    words = re.match(r"\s*".join(map(re.escape, prompt.split())) + r"\s*", whole)
    return words.end() if words else len(whole)
