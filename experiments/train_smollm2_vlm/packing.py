"""Training rows: an image's prefix and as many questions about it as fit, each of which sees the prefix and itself.

Row = [<|im_start|> user, newline, mark, image, mark] [question <|im_end|> .. assistant, newline, answer <|im_end|>] [question ..]
.. with positions that start again behind the prefix. That equals one sequence a question at half of the tokens
(tests/unit/test_grafted.py holds it on a small model).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.processing_utils import ProcessorMixin

from mgvq.data.tiny_vqa.dataset import DrawnImage
from mgvq.data.tiny_vqa.questions import Question
from mgvq.data.tiny_vqa.scene import SIDE

IGNORE = -100
_BLOCKED = -1e4  # added to a score: nothing of it is left


@dataclass(frozen=True)
class Row:
    """One image's sequence before it is padded."""

    ids: list[int]
    owner: list[int]  # 0 the prefix, 1, 2, .. a question
    positions: list[int]
    labels: list[int]  # the next token, IGNORE outside the answers


@dataclass(frozen=True)
class Packed:
    """Rows `b`, positions `s`."""

    ids: Tensor  # (b, s)
    positions: Tensor  # (b, s)
    mask: Tensor  # (b, 1, s, s), added to the scores
    labels: Tensor  # (b, s)
    owner: Tensor  # (b, s), -1 the padding


class Packer:
    """Writes rows in the chat format of the model; the prefix is what its processor makes of a prompt up to the image's end."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self.tokenizer = processor.tokenizer
        blank, text = np.zeros((SIDE, SIDE, 3), np.uint8), f"<|im_start|>user\n{processor.image_token}"
        self.prefix: list[int] = processor(images=[blank], text=[text], return_tensors="pt")["input_ids"][0].tolist()
        self.turn = self._encode("<|im_end|>\n<|im_start|>assistant\n")
        self.end = self._encode("<|im_end|>")

    def row(self, questions: Sequence[Question], longest: int) -> Row:
        """The questions that fit into `longest` tokens; the first always does."""
        ids, owner = list(self.prefix), [0] * len(self.prefix)
        positions, labels = list(range(len(ids))), [IGNORE] * len(ids)
        for number, question in enumerate(questions, start=1):
            asked = self._encode(question.text) + self.turn
            answer = self._encode(question.answer) + self.end
            if len(ids) + len(asked) + len(answer) > longest and number > 1:
                continue
            whole = asked + answer
            ids += whole
            owner += [number] * len(whole)
            positions += range(len(self.prefix), len(self.prefix) + len(whole))
            labels += [*[IGNORE] * (len(asked) - 1), *answer, IGNORE]
        return Row(ids, owner, positions, labels)

    def pack(self, rows: Sequence[Row]) -> Packed:
        """The rows side by side, padded behind."""
        shape = (len(rows), max(len(row.ids) for row in rows))
        ids, positions = torch.full(shape, self.end[0]), torch.zeros(shape, dtype=torch.long)
        labels, owner = torch.full(shape, IGNORE), torch.full(shape, -1)
        for b, row in enumerate(rows):
            for tensor, values in ((ids, row.ids), (positions, row.positions), (labels, row.labels), (owner, row.owner)):
                tensor[b, : len(values)] = torch.tensor(values)
        sees = (owner[:, :, None] == owner[:, None, :]) | (owner == 0)[:, None, :]
        sees &= torch.ones(shape[1], shape[1], dtype=torch.bool).tril()
        return Packed(ids, positions, torch.where(sees, 0.0, _BLOCKED)[:, None], labels, owner)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids


def hits(packed: Packed, logits: Tensor, rows: Sequence[DrawnImage]) -> list[tuple[str, bool]]:
    """The type of every question, and whether each token of its answer has the largest logit (greedy decoding, exact match)."""
    asked = packed.labels != IGNORE
    right = torch.ones_like(asked)
    right[asked] = logits.argmax(-1) == packed.labels[asked]
    return [
        (question.type, bool(right[b][packed.owner[b] == number].all()))
        for b, image in enumerate(rows)
        for number, question in enumerate(image.questions, start=1)
    ]
