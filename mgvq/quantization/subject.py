"""What is quantised block by block: a model, its layers, and the samples that run through it meanwhile."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel

from mgvq.model.walk import AnyBatch
from mgvq.model.weights import InModel, Weights
from mgvq.ranks.ranks import ALONE, Ranks
from mgvq.types import Site


@dataclass(frozen=True)
class Samples:
    """The calibration samples of the block loop; the two parts share none."""

    batches: Sequence[AnyBatch]  # for gradients
    heldout: Sequence[AnyBatch]  # for choosing between steps
    folder: Path | None = None  # for files of what the loop keeps and memory need not hold; None: memory holds it


@dataclass(frozen=True)
class Subject:
    """A model under quantisation. Every process (`ranks`) is given the same, and runs its own share of the samples."""

    model: PreTrainedModel
    sites: Sequence[Site]
    """The layers that are quantised, in the order of the data."""
    samples: Samples
    streamed: Weights | None = None
    """Where the weights of `sites` are; None: they are the model's own parameters."""
    ranks: Ranks = ALONE

    @cached_property
    def weights(self) -> Weights:
        return self.streamed or InModel(self.model)
