"""Answers token by token. Questions about the same image share what the model has seen of it."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel

from mgvq.model.encode import chat_prompt
from mgvq.model.pack import can_pack
from mgvq.model.image import Question, prefix_inputs, split_prompt, tokens


@torch.inference_mode()
def generate(
    model: PreTrainedModel, processor: Any, questions: Sequence[Question], batch_size: int, settings: Mapping[str, Any]
) -> list[str]:
    """The answers in the order of the questions, special tokens left out; `settings` are those of transformers' `generate`.

    `batch_size` images are looked at together, and as many questions answered together, those of like length. Where positions
    are no plain counts (`can_pack`), images take different numbers of tokens, or a question shows several, every question
    looks at its images itself; the answers are the same (a test holds it).
    """
    answers = [""] * len(questions)
    for run in _runs(questions, batch_size):
        asked = [questions[i] for i in run]
        single = all(isinstance(image, Image) for image, _ in asked)
        seen = _Seen(model, processor, asked) if single and can_pack(model) else None
        order = sorted(range(len(run)), key=lambda i: (len(asked[i][1]), i))
        for at in range(0, len(order), batch_size):
            part = order[at : at + batch_size]
            if seen is not None and seen.alike:
                inputs = seen.inputs(part)
            else:
                images = [_shown(asked[i]) for i in part]
                prompts = [chat_prompt(processor, asked[i][1], len(own)) for i, own in zip(part, images, strict=True)]
                inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True)
                inputs = inputs.to(model.device)
            sequences: Tensor = model.generate(**inputs, **settings)  # type: ignore[operator]
            new = sequences[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(part, processor.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[run[i]] = text
    return answers


def _runs(questions: Sequence[Question], num_images: int) -> Iterator[list[int]]:
    """Consecutive questions about at most `num_images` images."""
    run: list[int] = []
    seen: set[bytes] = set()
    for i, question in enumerate(questions):
        pixels = b"".join(image.tobytes() for image in _shown(question))
        seen.add(pixels)
        if len(seen) > num_images:
            yield run
            run, seen = [], {pixels}
        run.append(i)
    if run:
        yield run


def _shown(question: Question) -> list[Image]:
    images, _ = question
    return [images] if isinstance(images, Image) else list(images)


class _Seen:
    """The keys and values of some images, each computed once."""

    def __init__(self, model: PreTrainedModel, processor: Any, questions: Sequence[Question]) -> None:
        self._processor, self._device = processor, model.device
        first: dict[bytes, int] = {}
        self._image = [first.setdefault(_shown(q)[0].tobytes(), len(first)) for q in questions]
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
