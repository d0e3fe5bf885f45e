"""The carriers that the stages hand to each other; what the variants of a stage have to offer is in `mgvq.protocols`.

Dimension names: `out in` features of a linear layer, `c` columns (input channels) of one channel slice, `v` vectors in a row of a
channel slice, `n` vectors, `d` vector length, `k` centroids, `b` batch, `s` sequence, `u` table groups, `r` rates.

The words of the method, from small to large. A *channel* is one input channel, a column of a weight. A *channel slice* is the
columns of one channel group in one layer. A *table group* is the channel slices that share a codebook table, hence a rate: what
the allocation decides about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mgvq.formats.outliers import Outliers
from mgvq.linalg import DiagonalPlusLowRank, row_runs

Tower = Literal["vision", "projector", "language"]
Modality = Literal["image", "text"]
MODALITIES: tuple[Modality, ...] = ("image", "text")


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One quantisable linear layer."""

    name: str
    """The dotted name of the module in the model."""
    tower: Tower
    """The part of the model that the layer belongs to."""
    kind: str
    """The layer's own name, such as `q_proj`."""
    block: int | None
    """The number of the layer's block in its tower; None outside the blocks."""
    out_features: int
    """Rows of the weight."""
    in_features: int
    """Columns of the weight, the input channels."""
    reads: str = ""
    """A name of the activations that the layer multiplies, equal for layers that read the same (q, k and v of an attention),
    which therefore share their Gram and their channel groups. Left empty, it becomes the layer's own name: nobody else reads
    them."""

    def __post_init__(self) -> None:
        if not self.reads:
            object.__setattr__(self, "reads", self.name)

    @property
    def num_weights(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass takes, and which positions of it are image tokens, answer tokens and no padding."""

    inputs: Mapping[str, Tensor]
    """The keyword arguments of the model's forward pass."""
    image_mask: Bool[Tensor, "b s"]
    """The image tokens."""
    loss_mask: Bool[Tensor, "b s"]
    """The answer tokens themselves; the position before each of them predicts it."""
    valid_mask: Bool[Tensor, "b s"]
    """All tokens but padding."""
    sample_ids: tuple[str, ...]
    """A name for each of the `b` samples, unique in the calibration set."""

    def to(self, device: torch.device) -> "Batch":
        inputs = {k: v.to(device) for k, v in self.inputs.items()}
        image_mask, loss_mask, valid_mask = (m.to(device) for m in (self.image_mask, self.loss_mask, self.valid_mask))
        return Batch(inputs, image_mask, loss_mask, valid_mask, self.sample_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Which statistics a variant reads. `a | b` is what both read together; every pass over the data collects one such set."""

    gram: bool = False
    """The Gram of the inputs by modality (forward passes only)."""
    clip: float | None = None
    """How many times the median energy a token may weigh in the Gram; None: every token weighs 1. It is the same Gram that all
    variants of a run read."""
    fisher: bool = False
    """The output Fisher by modality (a backward pass from sampled labels)."""
    saliency: bool = False
    """The mean absolute gradient of the outputs by modality (a backward pass from the right answers)."""
    gradient: bool = False
    """The gradient of the weight (the same pass)."""
    channel_groups: int = 0
    """This many Grams weighted by the squared gradients of groups of output channels (GuidedQuant; 1: weighted by token)."""
    sequences: bool = False
    """The Kronecker factors of whole sequences (YAQA's sketch B)."""
    power_rounds: int = 0
    """Rounds of the power iteration over tokens (YAQA's sketch A), each of which takes two more passes over the data."""

    def __or__(self, other: "Needs") -> "Needs":
        """Raises ValueError for two different clips, or numbers of channel groups or rounds: one pass collects one of each."""
        merged: dict[str, Any] = {}
        for name in ("clip", "channel_groups", "power_rounds"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine and theirs and mine != theirs:
                raise ValueError(f"{name} of {mine} and of {theirs} cannot be collected together")
            merged[name] = mine or theirs
        for name in ("gram", "fisher", "saliency", "gradient", "sequences"):
            merged[name] = getattr(self, name) or getattr(other, name)
        return Needs(**merged)

    def __bool__(self) -> bool:
        return self != Needs()


@dataclass(frozen=True, slots=True)
class Kronecker:
    """Two factors whose Kronecker product estimates the Fisher of the mean answer loss, scale included."""

    h_in: Float[Tensor, "in in"]
    """The factor of the input channels."""
    h_out: Float[Tensor, "out out"]
    """The factor of the output channels."""


@dataclass(frozen=True, slots=True)
class SiteStats:
    """Statistics of one layer over the calibration tokens. What was not asked for (`Needs`) is empty or None.

    They are sums, not means, but for `saliency` and `gradient`: `num_tokens` divides the Grams, and `num_answers` what is made of
    gradients. The plain Gram may have seen more samples (`calibration.gram_samples`). x is the layer's input at a token, y its
    output, and g the gradient of the *summed* cross-entropy with respect to y: of labels that are *sampled from the model*
    in `fisher`, `sequence` and `token`, of the right answers in the others.
    """

    num_tokens: Mapping[Modality, int]
    """The tokens that the Gram has seen, whatever they weigh in it."""
    gram: Mapping[Modality, Float[Tensor, "in in"]]
    """`sum x x^T` (docs/method.md, eq. (gram)); where `Needs.clip` asks for it, tokens of much energy are weighed down."""
    num_answers: int = 0
    """The answer tokens of all samples."""
    fisher: Mapping[Modality, Float[Tensor, "out out"]] = field(default_factory=dict)
    """`sum g g^T` (docs/method.md, eq. (fisher))."""
    saliency: Mapping[Modality, float] = field(default_factory=dict)
    """The mean |g| over output channels and tokens; no entry for a modality without tokens that gradients have seen."""
    gradient: Float[Tensor, "out in"] | None = None
    """The gradient of the *mean* answer loss: `sum g x^T / num_answers`."""
    channel_gram: Float[Tensor, "k in in"] | None = None
    """`sum (mean g^2 over the k-th run of output channels) x x^T` (docs/method.md, eq. (guided))."""
    sequence: Kronecker | None = None
    """YAQA's sketch B (docs/method.md, eq. (sketch-b))."""
    token: Kronecker | None = None
    """YAQA's sketch A (docs/method.md, eq. (sketch-a))."""


StatsBank = Mapping[Site, SiteStats]


@dataclass(frozen=True, slots=True)
class Metric:
    """What rounding minimises: `1/2 sum_k tr(h_out D_k h_in[k] D_k^T)` of the error D, whose rows are dealt into runs D_k.

    The runs are those of `row_runs`. See docs/method.md, eq. (kronecker).
    """

    h_in: tuple[Float[Tensor, "in in"], ...]
    """One input factor for each run of rows, usually one for all rows."""
    h_out: Float[Tensor, "out out"] | DiagonalPlusLowRank | None = None
    """The output factor, with which the value is in nats of the mean answer loss; None stands for the identity."""

    def dense_h_out(self) -> Float[Tensor, "out out"] | None:
        """The output factor as a matrix, for those who factor it."""
        return self.h_out.dense() if isinstance(self.h_out, DiagonalPlusLowRank) else self.h_out

    def to(self, device: torch.device) -> "Metric":
        """The same metric with its factors on `device`."""
        return Metric(tuple(h.to(device) for h in self.h_in), None if self.h_out is None else self.h_out.to(device))

    def row_runs(self, num_rows: int) -> list[tuple[slice, Float[Tensor, "in in"]]]:
        """The runs of the `num_rows` rows, each with its input factor; raises ValueError for more factors than runs."""
        return list(zip(row_runs(num_rows, len(self.h_in)), self.h_in, strict=True))

    def gradient(self, error: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The derivative of the value with respect to the error, `h_out D_k h_in[k]`, in float32 on the error's device."""
        products = [error[rows] @ h_in.to(error) for rows, h_in in self.row_runs(len(error))]
        if self.h_out is not None:
            h_out, runs = self.h_out.to(error), row_runs(len(error), len(self.h_in))
            products = [h_out[rows, rows] @ product for rows, product in zip(runs, products, strict=True)]
        return torch.cat(products)

    def loss(self, error: Float[Tensor, "out in"]) -> float:
        """The value for an error of the weight, in float32."""
        return 0.5 * float((self.gradient(error) * error).sum().double())

    def channel_importance(self) -> Float[Tensor, "in"]:
        """How much an error of each input channel counts: the mean diagonal of `h_in`."""
        return torch.stack([h.diagonal() for h in self.h_in]).mean(0).clamp(min=0)

    def mean_gram(self) -> Float[Tensor, "in in"]:
        """How much the errors of two input channels count together: the mean of `h_in`."""
        return torch.stack(self.h_in).mean(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProblem:
    """One layer's part of the quantisation problem: what is to be stored, and how its errors count.

    Stages that change the problem (a shifted target, a rotation) give another one; nobody writes into its tensors, and none of
    them is a view of the model's parameters, which the block loop overwrites.
    """

    site: Site
    weight: Float[Tensor, "out in"]  # of full precision less the outliers: what errors are measured against
    target: Float[Tensor, "out in"]  # what is rounded: the weight itself, or the weight moved by a gradient
    metric: Metric | None  # None: all errors count alike
    score: Float[Tensor, "in"]  # sensitivity of the input channels, on the CPU
    groups: Int[Tensor, "in"]  # the channel group of each input channel
    transform: Any = None  # the `LayerTransform` that turned all of the above; None: they are in the layer's own basis
    outliers: Outliers | None = None  # what is stored exactly, in the layer's own basis, and missing in `weight` and `target`

    def whole(self) -> Float[Tensor, "out in"]:
        """The weight with its outliers, float32, in the basis of the problem."""
        if self.outliers is None:
            return self.weight.float()
        outliers = self.outliers.dense()
        return self.weight.float() + (self.transform.weight(outliers) if self.transform else outliers)

    def of_model(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """What a weight in the model is in the problem: less the outliers, in float32, turned. The inverse of `in_own_basis`."""
        rest = weight.float() if self.outliers is None else weight.float() - self.outliers.dense()
        return self.transform.weight(rest) if self.transform else rest

    def in_own_basis(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """What a weight of the problem, or what its codes stand for, is in the model: turned back, with the outliers."""
        back = self.transform.weight_back(weight) if self.transform else weight
        return back if self.outliers is None else back + self.outliers.dense()


@dataclass(frozen=True, slots=True)
class Rate:
    """One precision that a codebook offers."""

    name: str
    """A name for people, unique in the codebook."""
    index_bits: float
    """Nominal index bits a weight, tables and scales not counted."""


@dataclass(frozen=True, slots=True)
class ChannelSlice:
    """The columns of one channel group in one layer."""

    site: Site
    """The layer."""
    group: int
    """The number of the channel group in the layer, from 0."""
    columns: Int[Tensor, "c"]
    """The input channels of the group, ascending."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.site.out_features, len(self.columns)

    @property
    def num_weights(self) -> int:
        return self.site.out_features * len(self.columns)


@dataclass(frozen=True, slots=True)
class TableGroupInfo:
    """What an allocation may know of a table group beside its costs.

    Where layers share a table, `kind`, `block` and `depth` are those of the first channel slice.
    """

    name: str
    """The codebook's name for the group, which also names the random stream of its fit."""
    tower: Tower
    """The tower of its layers."""
    kind: str
    """The layer kind, such as `q_proj`."""
    block: int | None
    """The number of the block in its tower; None outside the blocks."""
    depth: float
    """The place of the block in its tower, from 0 to 1; .5 outside the blocks."""
    group: int
    """The number of the channel group."""
    num_weights: int
    """The weights of all its channel slices."""
    score: float
    """The sum of the channel scores."""
    quantile: float
    """The rank of the mean channel score among those of its tower, from 0 to 1."""
    log_energy: float = 1.0
    """The mean over its channels of log2(I + 1), I a channel's score over the geometric mean of its layer's."""


@dataclass(frozen=True, slots=True)
class RateTable:
    """What every rate costs and loses in every table group."""

    table_groups: Sequence[TableGroupInfo]
    """The `u` table groups."""
    rates: Sequence[Rate]
    """The `r` rates, by ascending index bits."""
    bits: Int[Tensor, "u r"]
    """Stored bits, exact, with tables and scales."""
    loss: Float[Tensor, "u r"]
    """The predicted loss, `sum_c score_c * relative squared error of channel c`: measured on the fitted codebook, or modelled as
    `score * 2^(-2 bits)`, or zeros where the allocation does not look at it."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What an evaluation found."""

    metrics: Mapping[str, float]
    """Figures by name; NaN where a sample has no finite number, so that there is no mean."""
    samples: pd.DataFrame = field(repr=False)
    """One row for each sample: `task, sample_id, sample_hash, type, question, answer, prediction, score`."""
    flags: tuple[str, ...] = ()
    """What tables must say of it: `non_finite:METRIC:SAMPLES`, `unanswered:TASK:QUESTIONS`."""
    reference: pd.DataFrame | None = field(default=None, repr=False)
    """`score` and `loss` of the full-precision model for the rows of `samples`, for the model card; None: it was not asked."""
