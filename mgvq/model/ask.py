"""One question to a model, about an image or about nothing but itself, and the answer as text."""

from typing import Any

import torch
from PIL.Image import Image
from transformers import PreTrainedModel

from mgvq.errors import UserError
from mgvq.model.chat import begins_itself, check_texts
from mgvq.model.classes import is_text_only, num_positions
from mgvq.model.generate import generate, greedy


def ask(model: PreTrainedModel, processor: Any, question: str, image: Image | None, max_new_tokens: int) -> str:
    """The greedy answer to one question, asked by itself. `image` is None for a model that reads only text, and only for it.

    Raises UserError where the question cannot be asked (a special token in it, too many tokens, an image that the processor does
    not take), and where the model computes what is no number.
    """
    check_texts(processor, "the question", [question])
    if is_text_only(model.config):
        return _continued(model, processor, question, max_new_tokens)
    assert image is not None, "the command asks for one"
    (reply,) = generate(model, processor, [(image, question)], 1, {"max_new_tokens": max_new_tokens})
    if reply.refused is not None:
        raise UserError(f"the question cannot be asked: {reply.refused}")
    if not reply.finite:
        raise UserError("the model computes NaN or infinity, so it has no answer: its checkpoint is of no use.")
    return reply.text.strip()


@torch.inference_mode()
def _continued(model: PreTrainedModel, tokenizer: Any, question: str, max_new_tokens: int) -> str:
    """A language model's answer in its chat template, or how it goes on where it has none."""
    text = question
    if tokenizer.chat_template:
        turn = {"role": "user", "content": question}
        text = tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt", **begins_itself(tokenizer, text)).to(model.device)
    length, limit = inputs["input_ids"].shape[1], num_positions(model.config)
    if not 0 < length < (limit or length + 1):
        raise UserError(f"the question has {length} tokens with its template; the model takes 1 to {(limit or 0) - 1}.")
    with greedy(model, tokenizer):
        tokens: Any = model.generate(**inputs, max_new_tokens=max_new_tokens)  # type: ignore[operator]
    return tokenizer.decode(tokens[0, length:], skip_special_tokens=True).strip()
