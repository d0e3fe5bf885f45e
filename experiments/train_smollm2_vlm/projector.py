"""The first look of the projector: it learns, without the language model, to say of each cell what the words of it say.

Its target is the sum of the embeddings of the words that describe a cell (`big red circle`, `green five`, `empty`) and of its row
and column, so that what the language model reads first is made of directions that it knows. A cross-entropy over the words of
each kind keeps those apart that are near each other, as the numbers are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from mgvq.data.tiny_vqa.scene import COLORS, GRID, KINDS, NUMBERS, SIZES, Scene

_EMPTY = "empty"
_ROWS, _COLUMNS = ("first", "second", "third", "fourth"), ("1", "2", "3", "4")
# What there is to say of a cell; a cell says one word, or none, of each.
_KINDS = ((*KINDS, _EMPTY), tuple(COLORS), tuple(SIZES), NUMBERS, _ROWS, _COLUMNS)
_NONE = -100


def words_of(scene: Scene) -> list[list[int]]:
    """For each cell and each kind of words the number of its word, or -100."""
    things = {thing.cell: thing for thing in scene.things}
    found = []
    for cell in range(GRID * GRID):
        thing = things.get(cell)
        said: list[str | None] = [_EMPTY, None, None, None]
        if thing is not None:
            size, digit = (thing.size, None) if thing.digit is None else (None, NUMBERS[thing.digit])
            said = [thing.kind, thing.color, size, digit]
        said += [_ROWS[cell // GRID], _COLUMNS[cell % GRID]]
        found.append([_NONE if word is None else kind.index(word) for word, kind in zip(said, _KINDS, strict=True)])
    return found


class Words:
    """The embeddings of all words of each kind."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, embedding: Tensor) -> None:
        def token(word: str) -> int:
            return tokenizer(word if word.isdigit() else f" {word}", add_special_tokens=False).input_ids[0]

        self.tables = [embedding[[token(word) for word in kind]] for kind in _KINDS]

    def loss(self, projected: Tensor, words: Tensor) -> Tensor:
        """Of outputs (cells, hidden) and the words of the cells (cells, kinds)."""
        target = torch.zeros_like(projected)
        apart = projected.new_zeros(())
        for table, said in zip(self.tables, words.unbind(-1), strict=True):
            there = said != _NONE
            target[there] += table[said[there]]
            centred = F.normalize(table - table.mean(0), dim=-1)
            apart = apart + F.cross_entropy(10 * F.linear(projected[there], centred), said[there])
        return (projected - target).square().mean() / target.var() + 0.2 * apart

    def right(self, projected: Tensor, words: Tensor) -> list[float]:
        """For each kind of words the share of cells that are nearest to the right one."""
        shares = []
        for table, said in zip(self.tables, words.unbind(-1), strict=True):
            there = said != _NONE
            centred = F.normalize(table - table.mean(0), dim=-1)
            shares.append(float((F.linear(projected[there], centred).argmax(-1) == said[there]).float().mean()))
        return shares


def first_look(
    projector: torch.nn.Module, features: Tensor, scenes: Sequence[Scene], words: Words, epochs: int, rate: float, seed: int
) -> list[list[float]]:
    """Train on the features (images, cells, width) of scenes; returns `Words.right` of the last tenth, unseen, epoch by epoch."""
    said = torch.tensor([words_of(scene) for scene in scenes])
    held = len(scenes) // 10
    optimizer = torch.optim.AdamW(projector.parameters(), lr=rate, weight_decay=0.0)
    batch = 64
    steps = epochs * ((len(scenes) - held) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    draw, course = torch.Generator().manual_seed(seed), []
    for _ in range(epochs):
        for at in torch.randperm(len(scenes) - held, generator=draw).split(batch):
            if len(at) < batch:
                continue
            loss = words.loss(projector(features[at]).flatten(0, 1), said[at].flatten(0, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            course.append(words.right(projector(features[-held:]).flatten(0, 1), said[-held:].flatten(0, 1)))
    return course
