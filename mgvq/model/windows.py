"""Texts in windows of tokens, as the literature reads them: one window after the other, and no text is scored twice.

A window of `length` tokens begins with what the tokenizer begins a text with (Gemma's and Llama's token), which is never scored;
nor is the first token of a text that nothing precedes. With a stride below the length windows overlap: what a window has in
common with the one before it is context, and only what is new is scored.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mgvq.errors import UserError
from mgvq.model.text import added_tokens
from mgvq.progress import Counted
from mgvq.types import Batch


@dataclass(frozen=True, slots=True)
class Window:
    """One window, all of whose tokens but the first few are scored."""

    sample_id: str  # DOCUMENT-NUMBER
    ids: tuple[int, ...]  # with those that the tokenizer begins a text with
    num_context: int  # tokens at its beginning that are read and not scored


@dataclass(frozen=True, slots=True)
class Windows:
    """Texts that are cut once a tokenizer is there."""

    group: str  # whose settings `window` and `stride` are, for messages
    documents: Mapping[str, str]
    length: int  # tokens of a window
    stride: int  # tokens from one window to the next
    least: int  # windows that there must be

    def cut(self, processor: Any) -> list[Window]:
        """All whole windows; what is left over at the end of a document is left out, and so are documents below a window.

        Windows of one document belong together (`DOCUMENT-NUMBER`), but where there is a single one they are told apart as
        documents are: questions of chance need several. Raises UserError for fewer windows than asked for.
        """
        tokenizer = getattr(processor, "tokenizer", processor)
        begin, _ = added_tokens(tokenizer)
        room, step = self.length - len(begin), min(self.stride, self.length - len(begin))
        if room < 2:
            raise UserError(f"{self.group}.window={self.length} has no room for text: the tokenizer adds {len(begin)} tokens.")
        found = []
        for name, text in self.documents.items():
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            for number, at in enumerate(range(0, len(ids) - room + 1, step)):
                context = max(len(begin), 1) if at == 0 else max(len(begin) + room - step, 1)
                sample_id = f"{name}-{number}" if len(self.documents) > 1 else f"{name}:{number}-0"
                found.append(Window(sample_id, (*begin, *ids[at : at + room]), context))
        if len(found) < self.least:
            raise UserError(
                f"{self.group} asks for {self.least} windows of {self.length} tokens, and the text has {len(found)} (of "
                f"{len(self.documents)} documents, each cut by itself). Ask for fewer or shorter windows, or give more text."
            )
        return found


def window_batches(windows: Sequence[Window], size: int) -> Iterator[Batch]:
    """`size` windows at a time; all have the same length."""
    parts = [windows[at : at + size] for at in range(0, len(windows), size)]
    return Counted(map(_batch, parts), len(parts))


def _batch(windows: Sequence[Window]) -> Batch:
    ids = torch.tensor([window.ids for window in windows])
    valid = torch.ones_like(ids, dtype=torch.bool)
    scored = torch.arange(ids.shape[1]) >= torch.tensor([[window.num_context] for window in windows])
    inputs = {"input_ids": ids, "attention_mask": valid.long()}
    return Batch(inputs, torch.zeros_like(valid), scored, valid, tuple(window.sample_id for window in windows))
