"""The base class of calibration sets that are given as rows: a seeded draw, held-out rows with images of their own."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch

from mgvq.calibration.examples import ExampleSet
from mgvq.calibration.rows import Row
from mgvq.checks import whole_number
from mgvq.errors import UserError
from mgvq.model.chat import Chat, Turn
from mgvq.rng import generator


@dataclass(frozen=True, kw_only=True)
class Drawn(ABC):
    """A calibration set of rows that are drawn without replacement; held-out rows share no image with the others.

    Rows without images must differ in their texts.
    """

    path: str  # the file of the rows, or the data set
    num_samples: int  # rows for the statistics
    heldout_samples: int  # rows that choose the gradient step, drawn after the others
    batch_size: int  # samples that go through the model together, at most
    seed: int  # draws the rows
    label_seed: int  # draws the answers that are sampled from the model for its Fisher
    shows_images: ClassVar[bool] = True  # rows of text alone are allowed, which nobody knows before they are read

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("heldout_samples", 0), ("batch_size", 1), ("seed", 0), ("label_seed", 0)):
            whole_number(f"calibration.{name}", getattr(self, name), least=least)

    @abstractmethod
    def rows(self) -> Sequence[Row]:
        """All rows that can be drawn. Raises UserError where `path` is not what it should be."""

    @abstractmethod
    def turns(self, row: Row) -> tuple[Turn, ...]:
        """The conversation of one row. Raises UserError with its place where it is bad."""

    def draw(self) -> ExampleSet:
        """Raises UserError for too few rows, and as `rows` and `turns` do."""
        rows = self.rows()
        wanted = self.num_samples + self.heldout_samples
        if len(rows) < wanted:
            raise UserError(
                f"{self.path} has {len(rows)} rows, but calibration.num_samples + heldout_samples asks for {wanted}: "
                "an empty or short set cannot calibrate. Lower the two numbers or add rows."
            )
        order = iter(torch.randperm(len(rows), generator=generator(self.seed, "calibration")).tolist())
        examples = [self._chat(rows[index]) for index in islice(order, self.num_samples)]
        seen = {mark for chat in examples for mark in _marks(chat)}
        others = (chat for chat in (self._chat(rows[index]) for index in order) if seen.isdisjoint(_marks(chat)))
        heldout = list(islice(others, self.heldout_samples))
        if len(heldout) < self.heldout_samples:
            raise UserError(
                f"{self.path}: only {len(heldout)} rows share no image with the {self.num_samples} that are drawn, but "
                f"calibration.heldout_samples={self.heldout_samples}. Lower one of the two, or add rows about other images."
            )
        return ExampleSet(examples, heldout, self.label_seed, self.batch_size)

    def _chat(self, row: Row) -> Chat:
        return Chat(row.sample_id, self.turns(row))


def _marks(chat: Chat) -> set[str]:
    """Digests of the images, or of the text where there are none: no sample for the statistics shares one with a held-out one."""
    shown = [image.tobytes() for image in chat.images] or ["\n".join(turn.text for turn in chat.turns).encode()]
    return {hashlib.sha256(content).hexdigest() for content in shown}
