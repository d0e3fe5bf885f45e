"""What every calibration set does with its examples: checks, micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mgvq.errors import UserError
from mgvq.model.encode import Example, Sample, batches
from mgvq.types import Batch

MICRO_BATCH = 64  # fixed: statistics would move in the last digit with it


@dataclass(frozen=True)
class ExampleSet:
    """The drawn examples. Raises UserError where there are none to calibrate on, or a sample is in both parts."""

    examples: Sequence[Sample]
    heldout_examples: Sequence[Sample]
    label_seed: int
    batch_size: int = MICRO_BATCH

    def __post_init__(self) -> None:
        if not self.examples:
            raise UserError("the calibration set is empty: raise calibration.num_images, or put rows into the data file.")
        if both := {e.sample_id for e in self.examples} & {e.sample_id for e in self.heldout_examples}:
            raise UserError(f"calibration and held-out samples overlap: {sorted(both)[:3]} and {len(both)} in all.")

    @property
    def packable(self) -> bool:
        return all(isinstance(sample, Example) for sample in (*self.examples, *self.heldout_examples))

    def batches(self, processor: Any) -> Iterator[Batch]:
        """Raises UserError, before the first batch, where the chat template does not fit one of the samples of either part."""
        for sample in (*self.examples, *self.heldout_examples):
            sample.render(processor)
        return batches(processor, self.examples, self.batch_size)

    def heldout(self, processor: Any) -> Iterator[Batch]:
        return batches(processor, self.heldout_examples, self.batch_size)
