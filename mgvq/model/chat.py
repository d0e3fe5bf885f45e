"""Conversations of texts and images, and what a processor's chat template makes of them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from PIL.Image import Image

from mgvq.checks import told_as
from mgvq.errors import UserError


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str  # system | user | assistant
    parts: tuple[str | Image, ...]  # texts and images, in their order

    @property
    def text(self) -> str:
        """The texts, one behind the other, without the images."""
        return "".join(part for part in self.parts if isinstance(part, str))

    def message(self) -> dict[str, Any]:
        """The message as chat templates read it."""
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in self.parts]
        return {"role": self.role, "content": content}


@dataclass(frozen=True, slots=True)
class Answer:
    """Where an answer stands in a rendered text."""

    start: int  # its first character
    stop: int  # the character behind its last one
    num_images: int  # how many images are shown before it


@dataclass(frozen=True, slots=True)
class Rendered:
    """A sample as a processor takes it."""

    text: str  # each image is still one token in it
    answers: tuple[Answer, ...]  # where the answers are, which the loss is about


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that ends with an answer."""

    sample_id: str  # where it comes from; errors begin with it
    turns: tuple[Turn, ...]

    @property
    def images(self) -> tuple[Image, ...]:
        """All images, in the order in which they are shown."""
        return tuple(p for turn in self.turns for p in turn.parts if not isinstance(p, str))

    @property
    def num_words(self) -> int:
        """The number of words of all turns; images do not count."""
        return sum(len(turn.text.split()) for turn in self.turns)

    def render(self, processor: Any) -> Rendered:
        """The last answer stands behind the generation prompt, where the model would write it; all before it is the template's.

        An answer goes from there to its end token. Where the template writes no end token, an answer ends before the white space
        that closes its turn, and an end token is put behind the last answer, since generation has to stop.

        Raises UserError where the template refuses the conversation, writes the answers elsewhere than behind the generation
        prompt (white space apart), or not at all, and where a text holds a special token, that of an image for instance.
        """
        check_texts(processor, self.sample_id, [turn.text for turn in self.turns])
        end = end_token(processor)
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
        return write_chat(processor, messages, self.sample_id, **settings)


def write_chat(processor: Any, messages: Sequence[dict[str, Any]], sample_id: str, **settings: Any) -> str:
    """What the chat template makes of the messages. Raises UserError where it raises anything at all."""
    what = (
        f"{sample_id}: the chat template of {type(processor).__name__} refuses it"
        if sample_id
        else (f"the chat template of {type(processor).__name__} refuses a plain question")
    )
    with told_as(
        what, "Set model.chat_template=FILE, a .jinja file that takes messages whose content is a list of texts and images."
    ):
        return processor.apply_chat_template(list(messages), tokenize=False, **settings)


def end_token(processor: Any) -> str:
    """The token behind an answer: of several end tokens the one that the chat template writes there (processor.py finds it)."""
    tokenizer = getattr(processor, "tokenizer", processor)
    found = getattr(tokenizer, "end_of_answer", None) or tokenizer.eos_token
    if found is None:
        raise UserError(f"{type(tokenizer).__name__} has no end token, and an answer ends with it: set model.end_token=TOKEN.")
    return found


def begins_itself(processor: Any, text: str) -> dict[str, bool]:
    """Settings for a tokenizer that begins texts with a token of its own: not again where the chat template has written it."""
    first = getattr(processor, "tokenizer", processor).bos_token
    return {"add_special_tokens": False} if first is not None and text.startswith(first) else {}


def check_texts(processor: Any, sample_id: str, texts: Iterable[str]) -> None:
    """Raises UserError where a text holds a special token of the tokenizer: the model would take it for an image, or an end."""
    tokenizer = getattr(processor, "tokenizer", processor)  # a language model has no other processor
    special = _special(tokenizer, getattr(processor, "image_token", None))
    for text in texts:
        if found := special.search(text):
            raise UserError(
                f"{sample_id}: {found[0]!r} in a text is a special token of {type(tokenizer).__name__}, and the model "
                f"would not read it as words. Take it out of {text[:60]!r}."
            )


@lru_cache(maxsize=4)
def _special(tokenizer: Any, image_token: str | None) -> re.Pattern[str]:
    """Whatever the tokenizer takes for more than its characters."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = {*added, *tokenizer.all_special_tokens, *([image_token] if image_token else [])}
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)")


def _behind(prompt: str, whole: str) -> int:
    """Where `whole` goes on behind the prompt, or behind the same words with other white space between (LLaVA-OneVision's
    template).

    It is the end of `whole` where that begins with neither.
    """
    if whole.startswith(prompt):
        return len(prompt)
    words = re.match(r"\s*".join(map(re.escape, prompt.split())) + r"\s*", whole)
    return words.end() if words else len(whole)
