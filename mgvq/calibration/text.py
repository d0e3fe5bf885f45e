"""Calibration on English prose: docstrings of Python's standard library, of which no paragraph is a test passage."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mgvq.checks import whole_number
from mgvq.data.english import docstrings
from mgvq.errors import UserError
from mgvq.model.text import Passage, text_batches
from mgvq.rng import generator
from mgvq.types import Batch

MICRO_BATCH = 2  # fixed: statistics would move in the last digit with it; the head's output of more fills gigabytes


@dataclass(frozen=True)
class PassageSet:
    """The passages that were drawn, for the statistics and held out."""

    examples: Sequence[Passage]
    heldout_examples: Sequence[Passage]
    label_seed: int
    packable: ClassVar[bool] = False

    def batches(self, processor: Any) -> Iterator[Batch]:
        return text_batches(processor, self.examples, MICRO_BATCH)

    def heldout(self, processor: Any) -> Iterator[Batch]:
        return text_batches(processor, self.heldout_examples, MICRO_BATCH)


@dataclass(frozen=True, kw_only=True)
class Text:
    """Passages of prose, drawn without replacement."""

    num_samples: int  # passages for the statistics
    heldout_samples: int  # passages that choose the gradient step, drawn after the others
    seed: int  # draws the passages
    label_seed: int  # draws the tokens that are sampled from the model for its Fisher
    shows_images: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("heldout_samples", 0), ("seed", 0), ("label_seed", 0)):
            whole_number(f"calibration.{name}", getattr(self, name), least=least)

    @property
    def texts(self) -> Mapping[str, str]:
        return {"calibration": docstrings().sha256}

    def draw(self) -> PassageSet:
        """Raises UserError where there are fewer passages than asked for."""
        passages = list(docstrings().passages.items())
        wanted = self.num_samples + self.heldout_samples
        if wanted > len(passages):
            raise UserError(
                f"calibration.num_samples + heldout_samples asks for {wanted} passages; the docstrings make {len(passages)}."
            )
        order = torch.randperm(len(passages), generator=generator(self.seed, "calibration"))[:wanted].tolist()
        drawn = [Passage(*passages[index]) for index in order]
        return PassageSet(drawn[: self.num_samples], drawn[self.num_samples :], self.label_seed)
