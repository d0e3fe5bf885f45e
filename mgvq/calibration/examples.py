"""What every calibration set does with its examples: checks, micro-batches, further samples for the Gram."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mgvq.checks import whole_number
from mgvq.errors import UserError
from mgvq.model.encode import Example, Sample, batches
from mgvq.protocols import CalibrationSet, HasGramSamples
from mgvq.types import Batch

MICRO_BATCH = 64  # fixed: statistics would move in the last digit with it


@dataclass(frozen=True)
class ExampleSet:
    """The drawn examples. Raises UserError where there are none to calibrate on, or a sample is in two of the parts."""

    examples: Sequence[Sample]
    heldout_examples: Sequence[Sample]
    label_seed: int
    batch_size: int = MICRO_BATCH
    gram_examples: Sequence[Sample] = ()

    def __post_init__(self) -> None:
        if not self.examples:
            raise UserError("the calibration set is empty: raise calibration.num_images, or put rows into the data file.")
        if both := {e.sample_id for e in (*self.examples, *self.gram_examples)} & {e.sample_id for e in self.heldout_examples}:
            raise UserError(f"calibration and held-out samples overlap: {sorted(both)[:3]} and {len(both)} in all.")

    @property
    def packable(self) -> bool:
        return all(isinstance(sample, Example) for sample in self._all())

    def batches(self, processor: Any) -> Iterator[Batch]:
        """Raises UserError, before the first batch, where the chat template does not fit one of the samples of any part."""
        for sample in self._all():
            sample.render(processor)
        return batches(processor, self.examples, self.batch_size)

    def heldout(self, processor: Any) -> Iterator[Batch]:
        return batches(processor, self.heldout_examples, self.batch_size)

    def gram_batches(self, processor: Any) -> Iterator[Batch]:
        return batches(processor, self.gram_examples, self.batch_size)

    def _all(self) -> Sequence[Sample]:
        return (*self.examples, *self.heldout_examples, *self.gram_examples)


def check_gram_samples(gram_samples: int | None, name: str, least: int) -> None:
    """Raises UserError unless `calibration.gram_samples` is None, or at least what the setting `name` is."""
    if gram_samples is not None:
        why = f"The Gram sees all samples of the gradients (calibration.{name}) and more; null: it sees those alone."
        whole_number("calibration.gram_samples", gram_samples, least=least, why=why)


def further_examples(drawn: CalibrationSet) -> Sequence[Any]:
    """The further samples that the Gram alone sees; none of a set that does not know such."""
    return drawn.gram_examples if isinstance(drawn, HasGramSamples) else ()


def further_batches(drawn: CalibrationSet, processor: Any) -> Iterator[Batch]:
    """The further samples as batches."""
    return drawn.gram_batches(processor) if isinstance(drawn, HasGramSamples) else iter(())
