"""The carriers that the stages hand to each other, and the protocols that the variants of a stage meet.

Dimension names: `out in` features of a linear layer, `n` vectors, `d` vector length, `k` centroids, `b` batch, `s` sequence.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

Tower = Literal["vision", "projector", "language"]
Modality = Literal["image", "text"]


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One quantisable linear layer. `block` is None outside the blocks; `kind` is the layer's own name (`q_proj`)."""

    name: str
    tower: Tower
    kind: str
    block: int | None
    out_features: int
    in_features: int

    @property
    def num_weights(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True, slots=True)
class Batch:
    """What a forward pass takes, and which positions are image tokens, answer tokens and no padding."""

    inputs: Mapping[str, Tensor]
    image_mask: Bool[Tensor, "b s"]
    loss_mask: Bool[Tensor, "b s"]  # the answer tokens themselves; the position before predicts each of them
    valid_mask: Bool[Tensor, "b s"]
    sample_ids: tuple[str, ...]

    def to(self, device: torch.device) -> "Batch":
        inputs = {k: v.to(device) for k, v in self.inputs.items()}
        image_mask, loss_mask, valid_mask = (m.to(device) for m in (self.image_mask, self.loss_mask, self.valid_mask))
        return Batch(inputs, image_mask, loss_mask, valid_mask, self.sample_ids)


@dataclass(frozen=True, slots=True)
class SiteStats:
    """Sums over the calibration tokens at one layer, by modality: tokens seen, and the Gram `sum x x^T` (not divided)."""

    num_tokens: Mapping[Modality, int]
    gram: Mapping[Modality, Float[Tensor, "in in"]]

    def second_moment(self) -> Float[Tensor, "in in"]:
        """`E[x x^T]` over the tokens of both modalities."""
        return sum(self.gram.values(), torch.zeros(())) / max(1, sum(self.num_tokens.values()))


StatsBank = Mapping[Site, SiteStats]


@runtime_checkable
class QuantizedWeight(Protocol):
    """A weight as it is stored. `tensors` are written as they are, so their bytes are what the weight costs."""

    format: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int]: ...
    def decode(self) -> Float[Tensor, "out in"]: ...
    def tensors(self) -> Mapping[str, Tensor]: ...
    def settings(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Rate:
    """One precision that a codebook offers: a name for people, its size parameter, and nominal index bits a weight."""

    name: str
    size: int
    index_bits: float


@dataclass(frozen=True, slots=True)
class Quantized:
    """What a codebook made of the layers it was given, and the fallbacks it took (empty clusters, say)."""

    weights: Mapping[Site, QuantizedWeight]
    flags: tuple[str, ...] = ()


@runtime_checkable
class Codebook(Protocol):
    """Quantises layers at one of its rates, and predicts the exact bits of that from the shapes alone."""

    def rates(self) -> Sequence[Rate]: ...
    def storage_bits(self, sites: Sequence[Site], rate: Rate) -> int: ...
    def quantize(self, weights: Mapping[Site, Tensor], rate: Rate, bank: StatsBank | None) -> Quantized: ...


@runtime_checkable
class Allocation(Protocol):
    """Chooses the rate under the budget: stored bits of all layers in scope."""

    def __call__(self, sites: Sequence[Site], codebook: Codebook, bits_per_weight: float) -> Rate: ...


@runtime_checkable
class CalibrationSet(Protocol):
    """The gradient samples and the held-out samples, disjoint from each other and from every test question."""

    def batches(self, processor: Any) -> Iterator[Batch]: ...
    def heldout(self, processor: Any) -> Iterator[Batch]: ...


@runtime_checkable
class Calibration(Protocol):
    """Draws the samples; bad data is reported here, before a model is loaded."""

    def draw(self) -> CalibrationSet: ...


@runtime_checkable
class Curvature(Protocol):
    """Statistics of the calibration batches at every site."""

    def collect(self, model: torch.nn.Module, sites: Sequence[Site], batches: Iterator[Batch]) -> StatsBank: ...


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Metrics by name, and one row a sample: `task, sample_id, sample_hash, type, question, answer, prediction, score`."""

    metrics: Mapping[str, float]
    samples: pd.DataFrame = field(repr=False)


@runtime_checkable
class Task(Protocol):
    """Evaluates a model against its full-precision reference."""

    def __call__(self, model: torch.nn.Module, reference: torch.nn.Module | None, processor: Any, label: str) -> EvalResult: ...
