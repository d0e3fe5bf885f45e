"""Training batches in which all questions of a picture share one image prefix.

Row = [<|user|> image tokens] [question <|assistant|> answer <|im_end|>] [question ...] ...: each question attends to the
prefix and to itself, and its positions start again behind the prefix. That equals one sequence a question (checked before
every training) at a third of the tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from mgvq.data.tiny_vqa.dataset import DrawnImage
from mgvq.data.tiny_vqa.questions import Question

IGNORE = -100
BLOCKED = -1e4  # additive: a boolean mask is silently added to the scores by eager attention


@dataclass(frozen=True)
class PackedBatch:
    """Pictures `b`, positions `s`."""

    pixels: torch.Tensor  # float (b, 3, h, w) in [-1, 1]
    ids: torch.Tensor  # (b, s)
    positions: torch.Tensor  # (b, s); (3, b, s) for M-RoPE: frame, row, column
    mask: torch.Tensor  # additive (b, 1, s, s)
    labels: torch.Tensor  # (b, s): the next token, IGNORE outside the answers
    question: torch.Tensor  # (b, s): number of the question that a label belongs to, -1 elsewhere


class Packer:
    """Turns pictures into batches for one model. Words are single tokens, so encoding is a look-up."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        tokens = processor.tokenizer
        blank = np.zeros((64, 64, 3), np.uint8)
        message = [{"role": "user", "content": [{"type": "image"}]}]
        prompt = processor.apply_chat_template(message, tokenize=False)
        inputs = processor(images=[blank], text=[prompt], return_tensors="pt")
        self.prefix: list[int] = inputs["input_ids"][0].tolist()
        self.prefix_positions = np.arange(len(self.prefix))
        if hasattr(model.base_model, "get_rope_index"):
            grid = {k: inputs[k] for k in ("input_ids", "mm_token_type_ids", "image_grid_thw")}
            self.prefix_positions = model.base_model.get_rope_index(**grid)[0][:, 0].numpy()
        self.assistant, self.end = tokens.convert_tokens_to_ids(["<|assistant|>", "<|im_end|>"])
        self._vocabulary: dict[str, int] = tokens.get_vocab()

    def encode(self, text: str) -> list[int]:
        return [self._vocabulary[f"\u0120{word}"] for word in text.split()]

    def segment(self, question: Question) -> tuple[list[int], int]:
        """Tokens of a question with its answer, and where the answer begins."""
        asked = [*self.encode(question.text), self.assistant]
        return [*asked, *self.encode(question.answer), self.end], len(asked)

    def __call__(self, pictures: list[DrawnImage]) -> PackedBatch:
        rows = [[self.segment(q) for q in p.questions] for p in pictures]
        num_prefix = len(self.prefix)
        length = num_prefix + max(sum(len(tokens) for tokens, _ in row) for row in rows)
        shape = (len(rows), length)
        ids, positions = np.full(shape, self.end), np.zeros((*self.prefix_positions.shape[:-1], *shape), np.int64)
        behind = self.prefix_positions.max() + 1
        owner = np.full(shape, -1)  # 0 prefix, 1.. the question, -1 padding
        labels, question = np.full(shape, IGNORE), np.full(shape, -1)
        for b, row in enumerate(rows):
            ids[b, :num_prefix], positions[..., b, :num_prefix], owner[b, :num_prefix] = self.prefix, self.prefix_positions, 0
            at = num_prefix
            for number, (tokens, answer_at) in enumerate(row):
                stop = at + len(tokens)
                ids[b, at:stop] = tokens
                positions[..., b, at:stop] = range(behind, behind + len(tokens))
                owner[b, at:stop] = number + 1
                labels[b, at + answer_at - 1 : stop - 1] = tokens[answer_at:]
                question[b, at + answer_at - 1 : stop - 1] = number
                at = stop
        owner_t = torch.from_numpy(owner)
        same = owner_t[:, :, None] == owner_t[:, None, :]
        seen = (same | (owner_t == 0)[:, None, :]) & torch.ones(length, length).tril().bool()
        pixels = torch.from_numpy(np.stack([p.pixels for p in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1
        return PackedBatch(
            pixels,
            torch.from_numpy(ids),
            torch.from_numpy(positions),
            torch.where(seen, 0.0, BLOCKED)[:, None],
            torch.from_numpy(labels),
            torch.from_numpy(question),
        )
