"""Calibration on prose: a text of the user's own, or docstrings of Python's standard library, none a test passage's paragraph."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mgvq.calibration.examples import check_gram_samples
from mgvq.checks import whole_number
from mgvq.data.english import docstrings
from mgvq.data.texts import TextSettings
from mgvq.errors import UserError
from mgvq.model.text import Passage, text_batches
from mgvq.model.windows import Window, Windows, window_batches
from mgvq.rng import generator
from mgvq.types import Batch

MICRO_BATCH = 2  # fixed: statistics would move in the last digit with it; the head's output of more fills gigabytes


@dataclass(frozen=True)
class PassageSet:
    """The passages that were drawn, for the statistics, held out and for the Gram alone."""

    examples: Sequence[Passage]
    heldout_examples: Sequence[Passage]
    gram_examples: Sequence[Passage]
    label_seed: int
    packable: ClassVar[bool] = False

    def batches(self, processor: Any) -> Iterator[Batch]:
        return text_batches(processor, self.examples, MICRO_BATCH)

    def heldout(self, processor: Any) -> Iterator[Batch]:
        return text_batches(processor, self.heldout_examples, MICRO_BATCH)

    def gram_batches(self, processor: Any) -> Iterator[Batch]:
        return text_batches(processor, self.gram_examples, MICRO_BATCH)


@dataclass(frozen=True)
class WindowSet:
    """Windows of tokens, drawn without replacement once a tokenizer is there."""

    windows: Windows
    num_samples: int
    heldout_samples: int
    seed: int
    label_seed: int
    heldout_examples: Sequence[Any] = ()
    gram_examples: Sequence[Any] = ()
    packable: ClassVar[bool] = False

    @property
    def examples(self) -> Sequence[Windows]:
        """All windows at once, for the checks before the model is read."""
        return (self.windows,)

    def batches(self, processor: Any) -> Iterator[Batch]:
        return window_batches(self._drawn(processor)[: self.num_samples], 1)

    def heldout(self, processor: Any) -> Iterator[Batch]:
        return window_batches(self._drawn(processor)[self.num_samples : self._first], 1)

    def gram_batches(self, processor: Any) -> Iterator[Batch]:
        further = self._drawn(processor)[self._first :] if self.windows.least > self._first else []
        return window_batches(further, 1)

    @property
    def _first(self) -> int:
        """How many windows come before those for the Gram alone."""
        return self.num_samples + self.heldout_samples

    def _drawn(self, processor: Any) -> list[Window]:
        found = self.windows.cut(processor)
        order = torch.randperm(len(found), generator=generator(self.seed, "calibration"))[: self.windows.least]
        return [found[index] for index in order.tolist()]


@dataclass(frozen=True, kw_only=True)
class Text(TextSettings):
    """Passages or windows of prose, drawn without replacement."""

    num_samples: int  # passages or windows for the statistics
    heldout_samples: int  # those that choose the gradient step, drawn after the others
    seed: int  # draws the passages
    label_seed: int  # draws the tokens that are sampled from the model for its Fisher
    gram_samples: int | None = None  # passages or windows for the Gram, num_samples among them; None: num_samples
    shows_images: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.check_settings("calibration")
        for name, least in (("num_samples", 1), ("heldout_samples", 0), ("seed", 0), ("label_seed", 0)):
            whole_number(f"calibration.{name}", getattr(self, name), least=least)
        check_gram_samples(self.gram_samples, "num_samples", self.num_samples)

    @property
    def texts(self) -> Mapping[str, str]:
        return {"calibration": self.sha256(docstrings())}

    def draw(self) -> PassageSet | WindowSet:
        """Raises UserError where there are fewer passages than asked for, and for a text that cannot be read."""
        first = self.num_samples + self.heldout_samples
        wanted = (self.gram_samples or self.num_samples) + self.heldout_samples
        if self.window is not None:
            texts = Windows("calibration", self.documents(docstrings()), self.window, self.stride or self.window, wanted)
            return WindowSet(texts, self.num_samples, self.heldout_samples, self.seed, self.label_seed)
        passages = list(self.corpus(docstrings()).passages.items())
        if wanted > len(passages):
            name = "num_samples" if self.gram_samples is None else "gram_samples"
            raise UserError(
                f"calibration.{name} + heldout_samples asks for {wanted} passages; "
                f"{self.path or 'the docstrings'} has {len(passages)}."
            )
        order = torch.randperm(len(passages), generator=generator(self.seed, "calibration"))[:wanted].tolist()
        drawn = [Passage(*passages[index]) for index in order]
        return PassageSet(drawn[: self.num_samples], drawn[self.num_samples : first], drawn[first:], self.label_seed)
