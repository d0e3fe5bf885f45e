"""The base class of calibration sets that are given as rows: a seeded draw, held-out rows with images of their own."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import ClassVar

import torch

from mgvq.calibration.examples import ExampleSet, check_gram_samples
from mgvq.calibration.rows import Row
from mgvq.checks import whole_number
from mgvq.errors import UserError
from mgvq.model.chat import Chat, Turn
from mgvq.rng import generator


@dataclass(frozen=True, kw_only=True)
class Drawn(ABC):
    """A calibration set of rows that are drawn without replacement; held-out rows share no image with any others.

    Rows without images must differ in their texts.
    """

    path: str  # the file of the rows, or the data set
    num_samples: int  # rows for the statistics
    heldout_samples: int  # rows that choose the gradient step, drawn after the others
    batch_size: int  # samples that go through the model together, at most
    seed: int  # draws the rows
    label_seed: int  # draws the answers that are sampled from the model for its Fisher
    gram_samples: int | None = None  # rows for the Gram, num_samples among them, the others drawn last; None: num_samples
    shows_images: ClassVar[bool] = True  # rows of text alone are allowed, which nobody knows before they are read

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("heldout_samples", 0), ("batch_size", 1), ("seed", 0), ("label_seed", 0)):
            whole_number(f"calibration.{name}", getattr(self, name), least=least)
        check_gram_samples(self.gram_samples, "num_samples", self.num_samples)

    @abstractmethod
    def rows(self) -> Sequence[Row]:
        """All rows that can be drawn. Raises UserError where `path` is not what it should be."""

    @abstractmethod
    def turns(self, row: Row) -> tuple[Turn, ...]:
        """The conversation of one row. Raises UserError with its place where it is bad."""

    def draw(self) -> ExampleSet:
        """Raises UserError for too few rows, and as `rows` and `turns` do."""
        rows = self.rows()
        for_gram = self.gram_samples or self.num_samples
        wanted = for_gram + self.heldout_samples
        if len(rows) < wanted:
            first = "num_samples" if self.gram_samples is None else "gram_samples"
            raise UserError(
                f"{self.path} has {len(rows)} rows, but calibration.{first} + heldout_samples asks for {wanted}: "
                "an empty or short set cannot calibrate. Lower the two numbers or add rows."
            )
        order = torch.randperm(len(rows), generator=generator(self.seed, "calibration")).tolist()
        chats = (self._chat(rows[index]) for index in order)
        examples = list(islice(chats, self.num_samples))
        seen = {mark for chat in examples for mark in marks(chat)}
        heldout, passed = list[Chat](), list[Chat]()
        while len(heldout) < self.heldout_samples and (chat := next(chats, None)):
            (heldout if seen.isdisjoint(marks(chat)) else passed).append(chat)
        if len(heldout) < self.heldout_samples:
            raise UserError(
                f"{self.path}: only {len(heldout)} rows share no image with the {self.num_samples} that are drawn, but "
                f"calibration.heldout_samples={self.heldout_samples}. Lower one of the two, or add rows about other images."
            )
        seen = {mark for chat in heldout for mark in marks(chat)}
        rest = (chat for chat in chain(passed, chats) if seen.isdisjoint(marks(chat)))
        further = list(islice(rest, for_gram - self.num_samples))
        if len(further) < for_gram - self.num_samples:
            raise UserError(
                f"{self.path}: only {self.num_samples + len(further)} rows share no image with the {len(heldout)} held-out ones, "
                f"but calibration.gram_samples={self.gram_samples}. Lower it, or add rows about other images."
            )
        return ExampleSet(examples, heldout, self.label_seed, self.batch_size, further)

    def _chat(self, row: Row) -> Chat:
        return Chat(row.sample_id, self.turns(row))


def marks(chat: Chat) -> set[str]:
    """Digests of the images, or of the text where there are none: no sample for the statistics shares one with a held-out one."""
    shown = [image.tobytes() for image in chat.images] or ["\n".join(turn.text for turn in chat.turns).encode()]
    return {hashlib.sha256(content).hexdigest() for content in shown}
