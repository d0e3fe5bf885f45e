"""All questions of an image in one row: the image is looked at once, and each question sees it and itself.

Row = [prompt up to the image's end] [question, answer, end] [question, answer, end] ...; positions start again behind the
image, and a mask keeps the questions apart. That equals one row a question (a test holds it), at less than half of the tokens.
"""

import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel

from mgvq.model.chat import check_texts, end_token
from mgvq.model.classes import is_text_only
from mgvq.model.encode import Example
from mgvq.model.family import family_of
from mgvq.model.image import prefix_inputs, split_prompt, tokens
from mgvq.progress import Counted

_BLOCKED = -1e4  # added to a score: nothing of it is left in any floating-point width


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Rows of an image and all questions about it: `b` images, `s` positions."""

    inputs: dict[str, Tensor]  # what a forward pass takes, with a mask that keeps the questions apart
    loss_mask: Bool[Tensor, "b s"]  # the answer tokens
    valid_mask: Bool[Tensor, "b s"]  # the tokens that are no padding
    sample_ids: tuple[str, ...]  # row by row
    sizes: tuple[int, ...]  # the answer tokens of each sample, in the order of `loss_mask`

    def to(self, device: torch.device, dtype: torch.dtype) -> "PackedBatch":
        """The batch on `device`, its mask in the model's `dtype`."""
        inputs = {k: v.to(device) for k, v in self.inputs.items()}
        inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
        return PackedBatch(inputs, self.loss_mask.to(device), self.valid_mask.to(device), self.sample_ids, self.sizes)


def can_pack(model: PreTrainedModel) -> bool:
    """Whether a question sees its image and itself through nothing but the mask, and positions are plain counts.

    Not so with rotary positions of an image's height and width (Qwen2-VL), where the model itself tells image from text tokens
    (Gemma 3), and where layers see a window or keep a state. A model of text alone has no images to share.
    """
    if is_text_only(model.config):
        return False
    if (declared := family_of(model.config).packable) is not None:
        return declared
    text = model.config.get_text_config(decoder=True)
    mrope = "mrope_section" in (getattr(text, "rope_parameters", None) or {})
    typed = any("token_type_ids" in name for name in inspect.signature(model.base_model.forward).parameters)
    return not mrope and not typed and set(getattr(text, "layer_types", None) or ()) <= {"full_attention"}


def packed_batches(processor: Any, examples: Sequence[Example], num_images: int) -> Iterator[PackedBatch]:
    """`num_images` rows at a time; examples that follow each other with the same image object share a row.

    Raises ValueError where the processor adds to the text behind the image.
    """
    rows = [list(group) for _, group in itertools.groupby(examples, key=lambda e: id(e.image))]
    parts = [rows[at : at + num_images] for at in range(0, len(rows), num_images)]
    return Counted((_pack(processor, part) for part in parts), len(parts))


def _pack(processor: Any, rows: Sequence[Sequence[Example]]) -> PackedBatch:
    tokenizer = processor.tokenizer
    inputs, prefixes = prefix_inputs(processor, [(row[0].image, row[0].question) for row in rows])
    segments = [[_segment(processor, e) for e in row] for row in rows]
    length = max(len(p) + sum(len(ids) for ids, _ in row) for p, row in zip(prefixes, segments, strict=True))
    shape = (len(rows), length)
    ids, positions = torch.full(shape, tokenizer.pad_token_id), torch.zeros(shape, dtype=torch.long)
    owner, loss_mask = torch.full(shape, -1), torch.zeros(shape, dtype=torch.bool)  # owner: 0 the prefix, 1, 2, .. a question
    for b, (prefix, row) in enumerate(zip(prefixes, segments, strict=True)):
        ids[b, : len(prefix)], owner[b, : len(prefix)] = torch.tensor(prefix), 0
        positions[b, : len(prefix)] = torch.arange(len(prefix))
        begin = len(prefix)
        for number, (segment, num_answer) in enumerate(row, start=1):
            end = begin + len(segment)
            ids[b, begin:end], owner[b, begin:end] = torch.tensor(segment), number
            positions[b, begin:end] = len(prefix) + torch.arange(len(segment))
            loss_mask[b, end - num_answer : end] = True
            begin = end
    sees = (owner[:, :, None] == owner[:, None, :]) | (owner == 0)[:, None, :]
    sees &= torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.where(sees, 0.0, _BLOCKED)[:, None]
    images = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    return PackedBatch(
        {**images, "input_ids": ids, "attention_mask": mask, "position_ids": positions},
        loss_mask,
        owner >= 0,
        tuple(e.sample_id for row in rows for e in row),
        tuple(num_answer for row in segments for _, num_answer in row),
    )


def _segment(processor: Any, example: Example) -> tuple[list[int], int]:
    """The tokens from behind the image to the end of the answer, and how many of them are the answer with its end token."""
    check_texts(processor, example.sample_id, (example.question, example.answer))
    tokenizer = processor.tokenizer
    _, asked = split_prompt(processor, example.question)
    whole = tokens(tokenizer, f"{asked}{example.answer}{end_token(processor)}")
    return whole, len(whole) - len(tokens(tokenizer, asked))
