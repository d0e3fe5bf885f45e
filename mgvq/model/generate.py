"""Answers token by token. Questions about the same image share what the model has seen of it."""

import copy
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from mgvq.checks import short_words
from mgvq.errors import UserError
from mgvq.model.chat import begins_itself, check_texts, end_token
from mgvq.model.classes import num_positions
from mgvq.model.encode import chat_prompt
from mgvq.model.hooks import after_forward
from mgvq.model.image import Question, Unaskable, prefix_inputs, split_prompt, tokens
from mgvq.model.pack import can_pack


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of a question."""

    text: str  # the answer without special tokens; empty where there is none
    finite: bool = True  # whether all logits that it was chosen from were finite; an answer of others says nothing
    refused: str | None = None  # why the question could not be asked: its image or its text is nothing that the model takes


@torch.inference_mode()
def generate(
    model: PreTrainedModel, processor: Any, questions: Sequence[Question], batch_size: int, settings: Mapping[str, Any]
) -> list[Reply]:
    """A reply to every question, in their order; `settings` are those of transformers' `generate`, in place of the model's own.

    `batch_size` images are looked at together, and as many questions answered together, those of like length. Where positions
    are no plain counts (`can_pack`), images take different numbers of tokens, or a question shows several, every question
    looks at its images itself; the answers are the same (a test holds it).
    """
    replies: list[Reply] = [Reply("")] * len(questions)
    with greedy(model, processor):
        for run in _runs(questions, batch_size, replies):
            try:
                _answer(model, processor, run, batch_size, settings, replies)
            except Exception:
                refused = _refused(model, processor, run)
                if not refused:  # it was not the questions' fault
                    raise
                for i, why in refused.items():
                    replies[i] = Reply("", refused=why)
                asked = {i: question for i, question in run.items() if i not in refused}
                if asked:
                    _answer(model, processor, asked, batch_size, settings, replies)
    return replies


def _answer(
    model: PreTrainedModel,
    processor: Any,
    run: Mapping[int, Question],
    batch_size: int,
    settings: Mapping[str, Any],
    replies: list[Reply],
) -> None:
    """Put the replies to the questions of a run, by their numbers, into `replies`."""
    numbers, asked = list(run), list(run.values())
    single = all(isinstance(image, Image) for image, _ in asked)
    seen = _Seen(model, processor, asked) if single and can_pack(model) else None
    order = sorted(range(len(run)), key=lambda i: (len(asked[i][1]), i))
    for at in range(0, len(order), batch_size):
        part = order[at : at + batch_size]
        if seen is not None and seen.alike:
            inputs = seen.inputs(part)
        else:
            inputs = _inputs(processor, [asked[i] for i in part]).to(model.device)
        _check_positions(model, inputs)
        with _watch_logits(model, len(part)) as finite:
            sequences: Tensor = model.generate(**inputs, **settings)  # type: ignore[operator]
        new = sequences[:, inputs["input_ids"].shape[1] :]
        texts = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        for i, text, is_finite in zip(part, texts, finite[0].tolist(), strict=True):
            replies[numbers[i]] = Reply(text if is_finite else "", is_finite)


def _inputs(processor: Any, questions: Sequence[Question]) -> Any:
    images = [_shown(question) for question in questions]
    prompts = [chat_prompt(processor, text, len(own)) for (_, text), own in zip(questions, images, strict=True)]
    return processor(images=images, text=prompts, return_tensors="pt", padding=True, **begins_itself(processor, prompts[0]))


def _check_positions(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    longest, limit = int(inputs["attention_mask"].sum(1).max()), num_positions(model.config)
    if limit is not None and longest >= limit:
        raise UserError(f"its prompt has {longest} tokens, and the model {limit} positions for prompt and answer")


def _refused(model: PreTrainedModel, processor: Any, run: Mapping[int, Question]) -> dict[int, str]:
    """The questions that cannot be asked even alone, by their numbers, and why: the processor takes no such image, say."""
    found = {}
    for i, question in run.items():
        try:
            check_texts(processor, "a question", [question[1]])
            _check_positions(model, _inputs(processor, [question]))
        except Exception as error:  # whatever the processor raises
            found[i] = short_words(error)
    return found


@contextmanager
def greedy(model: PreTrainedModel, processor: Any) -> Iterator[None]:
    """Inside, the model's own generation settings are out of force but for its end and pad tokens.

    Sampling, its temperature and penalties come with some repositories; with them no two runs would answer alike.
    """
    own, tokenizer = model.generation_config, getattr(processor, "tokenizer", processor)
    ends = getattr(own, "eos_token_id", None)
    ends = list(ends) if isinstance(ends, list | tuple) else [] if ends is None else [ends]
    written = tokenizer.convert_tokens_to_ids(end_token(processor))
    pad = getattr(own, "pad_token_id", None)
    model.generation_config = GenerationConfig(
        eos_token_id=[*ends, *([written] if written not in ends else [])],
        pad_token_id=tokenizer.pad_token_id if pad is None else pad,
        do_sample=False,
    )
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _watch_logits(model: PreTrainedModel, num_rows: int) -> Iterator[list[Tensor]]:
    """Inside, the head is watched; the one tensor of the list tells which rows had finite logits in every step."""
    finite = [torch.ones(num_rows, dtype=torch.bool, device=model.device)]

    def look(_: torch.nn.Module, __: Any, output: Tensor) -> None:
        finite[0] = finite[0] & torch.isfinite(output[:, -1]).all(-1)

    head: Any = model.get_output_embeddings()
    with after_forward(head, {"": look}):
        yield finite


def _runs(questions: Sequence[Question], num_images: int, replies: list[Reply]) -> Iterator[dict[int, Question]]:
    """Consecutive questions about at most `num_images` images, by number; those that cannot be read get their reply here."""
    run: dict[int, Question] = {}
    seen: set[Hashable] = set()
    for i in range(len(questions)):
        try:
            question = questions[i]
        except Unaskable as error:
            replies[i] = Reply("", refused=str(error))
            continue
        images = tuple(map(_told_apart, _shown(question)))
        seen.add(images)
        if len(seen) > num_images:
            yield run
            run, seen = {}, {images}
        run[i] = question
    if run:
        yield run


def _shown(question: Question) -> list[Image]:
    images, _ = question
    return [images] if isinstance(images, Image) else list(images)


def _told_apart(image: Image) -> Hashable:
    """What tells an image from all others. Its bytes alone do not: a wide one and a tall one may have the same."""
    return image.size, image.mode, image.tobytes()


class _Seen:
    """The keys and values of some images, each computed once."""

    def __init__(self, model: PreTrainedModel, processor: Any, questions: Sequence[Question]) -> None:
        self._processor, self._device = processor, model.device
        first: dict[Hashable, int] = {}
        self._image = [first.setdefault(_told_apart(_shown(q)[0]), len(first)) for q in questions]
        shown = {p: question for p, question in zip(self._image, questions, strict=True)}
        starts, self._rest = zip(*(split_prompt(processor, text) for _, text in questions), strict=True)
        inputs, prefixes = prefix_inputs(processor, [shown[p] for p in range(len(first))])
        self.alike = len(set(starts)) == 1 and len(set(map(len, prefixes))) == 1
        if self.alike:
            inputs = {k: v.to(model.device) for k, v in inputs.items()}
            self._ids = inputs["input_ids"]
            self._states = model.base_model(**inputs, use_cache=True).past_key_values

    def inputs(self, part: Sequence[int]) -> dict[str, Any]:
        """For `generate`: the prompts of some questions, with what was seen. They are padded behind the image, on the left."""
        images = torch.tensor([self._image[i] for i in part], device=self._device)
        pad = self._processor.tokenizer.pad_token_id
        rests = [tokens(self._processor.tokenizer, self._rest[i]) for i in part]
        longest = max(map(len, rests))
        rest = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in rests], device=self._device)
        real = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rests], device=self._device)
        ids = torch.cat([self._ids[images], rest], 1)
        mask = torch.cat([torch.ones_like(self._ids[images]), real], 1)
        states = copy.copy(self._states)
        states.layers = [copy.copy(layer) for layer in self._states.layers]  # selecting gives each its own keys and values
        states.batch_select_indices(images)
        return {"input_ids": ids, "attention_mask": mask, "past_key_values": states}
