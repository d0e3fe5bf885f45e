"""The carriers that the stages hand to each other; what the variants of a stage have to offer is in `mgvq.protocols`.

Dimension names: `out in` features of a linear layer, `c` columns (input channels) of one piece, `v` vectors in a row of a piece,
`n` vectors, `d` vector length, `k` centroids, `b` batch, `s` sequence, `u` units, `r` rates.

The words of the method, from small to large. A *channel* is one input channel, a column of a weight. A *piece* is the columns of
one channel group in one layer. A *unit* is the pieces that share a codebook table, hence a rate: what the allocation decides
about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Tower = Literal["vision", "projector", "language"]
Modality = Literal["image", "text"]
MODALITIES: tuple[Modality, ...] = ("image", "text")


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One quantisable linear layer. `block` is None outside the blocks; `kind` is the layer's own name (`q_proj`).

    `reads` names the activations that the layer multiplies: equal for layers that read the same (q, k and v of an attention),
    which therefore share their Gram and their channel groups. Empty: nobody else reads them.
    """

    name: str
    tower: Tower
    kind: str
    block: int | None
    out_features: int
    in_features: int
    reads: str = ""

    def __post_init__(self) -> None:
        if not self.reads:
            object.__setattr__(self, "reads", self.name)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Which statistics a variant reads. `a | b` is what both read together; every pass over the data collects one such set.

    `gram`: the inputs' Gram by modality (forward passes only). `gradients`: output Fisher, gradient and saliency too.
    `channel_groups`: as many Grams weighted by the squared gradients of groups of output channels (GuidedQuant; 1: by token).
    `sequences`: Kronecker factors of whole sequences (YAQA sketch B). `power_rounds`: rounds of the token-wise power iteration
    (YAQA sketch A), each two further passes over the data.
    """

    gram: bool = False
    gradients: bool = False
    channel_groups: int = 0
    sequences: bool = False
    power_rounds: int = 0

    def __or__(self, other: "Needs") -> "Needs":
        """Raises ValueError for two different numbers of channel groups or rounds: one pass collects one of each."""
        merged: dict[str, Any] = {}
        for name in ("channel_groups", "power_rounds"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine and theirs and mine != theirs:
                raise ValueError(f"{name} of {mine} and of {theirs} cannot be collected together")
            merged[name] = mine or theirs
        for name in ("gram", "gradients", "sequences"):
            merged[name] = getattr(self, name) or getattr(other, name)
        return Needs(**merged)

    def __bool__(self) -> bool:
        return self != Needs()


@dataclass(frozen=True, slots=True)
class Kronecker:
    """Two factors whose Kronecker product estimates the Fisher of the mean answer loss, scale included."""

    h_in: Float[Tensor, "in in"]
    h_out: Float[Tensor, "out out"]


@dataclass(frozen=True, slots=True)
class SiteStats:
    """Statistics of one layer over the calibration tokens, by modality; sums, not means (`num_tokens`, `num_answers` divide
    them).

    With x the layer's input at a token, y its output, `num_answers` the answer tokens of all samples: g is the gradient of the
    *summed* cross-entropy with respect to y, of labels *sampled from the model* for `fisher`, of the right answers for the
    others. What was not asked for (`Needs`) is empty or None.
    """

    num_tokens: Mapping[Modality, int]
    gram: Mapping[Modality, Float[Tensor, "in in"]]  # sum x x^T
    num_answers: int = 0
    fisher: Mapping[Modality, Float[Tensor, "out out"]] = field(default_factory=dict)  # sum g g^T
    saliency: Mapping[Modality, float] = field(default_factory=dict)  # sum over tokens of the mean |g| over output channels
    gradient: Float[Tensor, "out in"] | None = None  # of the mean answer loss: sum g x^T / num_answers
    channel_gram: Float[Tensor, "k in in"] | None = None  # sum of (mean g^2 over the k-th run of output channels) x x^T
    sequence: Kronecker | None = None  # YAQA sketch B
    token: Kronecker | None = None  # YAQA sketch A

    def second_moment(self) -> Float[Tensor, "in in"]:
        """`E[x x^T]` over the tokens of both modalities."""
        return sum(self.gram.values(), torch.zeros(())) / max(1, sum(self.num_tokens.values()))


StatsBank = Mapping[Site, SiteStats]


@dataclass(frozen=True, slots=True)
class Metric:
    """What rounding minimises: `1/2 sum_k tr(h_out D_k h_in[k] D_k^T)` of the error D, its rows in `len(h_in)` runs of equal
    size.

    `h_out` None is the identity. Where it is given the value is in nats of the mean answer loss.
    """

    h_in: tuple[Float[Tensor, "in in"], ...]
    h_out: Float[Tensor, "out out"] | None = None

    def loss(self, error: Float[Tensor, "out in"]) -> float:
        """What is minimised, of an error of the weight; in float32."""
        size = -(-len(error) // len(self.h_in))
        total = 0.0
        for k, h_in in enumerate(self.h_in):
            rows = slice(k * size, (k + 1) * size)
            image = error[rows] @ h_in.to(error)
            if self.h_out is not None:
                image = self.h_out.to(error)[rows, rows] @ image
            total += float((image * error[rows]).sum().double())
        return 0.5 * total

    def channel_importance(self) -> Float[Tensor, "in"]:
        """The mean diagonal of `h_in`: how much an error of an input channel counts."""
        return torch.stack([h.diagonal() for h in self.h_in]).mean(0).clamp(min=0)

    def mean_gram(self) -> Float[Tensor, "in in"]:
        """The mean of `h_in`."""
        return torch.stack(self.h_in).mean(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProblem:
    """One layer's part of the quantisation problem: what is to be stored, and how its errors count.

    Stages that change the problem (a shifted target, a rotation) give another one; nobody writes into its tensors, and none of
    them is a view of the model's parameters, which the block loop overwrites.
    """

    site: Site
    weight: Float[Tensor, "out in"]  # of full precision: what errors are measured against
    target: Float[Tensor, "out in"]  # what is rounded: the weight itself, or the weight moved by a gradient
    metric: Metric | None  # None: all errors count alike
    score: Float[Tensor, "in"]  # sensitivity of the input channels, on the CPU
    groups: Int[Tensor, "in"]  # the channel group of each input channel


@dataclass(frozen=True, slots=True)
class Rate:
    """One precision that a codebook offers: a name for people, and nominal index bits a weight."""

    name: str
    index_bits: float


@dataclass(frozen=True, slots=True)
class ChannelSlice:
    """The columns of one channel group in one layer, in ascending order."""

    site: Site
    group: int
    columns: Int[Tensor, "c"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.site.out_features, len(self.columns)

    @property
    def num_weights(self) -> int:
        return self.site.out_features * len(self.columns)


@dataclass(frozen=True, slots=True)
class TableGroupInfo:
    """What an allocation may know of a unit beside its costs. `quantile`: of its mean channel score within its tower, in [0,
    1]."""

    name: str
    tower: Tower
    kind: str
    block: int | None
    depth: float  # of the first piece's block in its tower, 0 .. 1; outside the blocks: .5
    group: int
    num_weights: int
    score: float  # sum of the channel scores
    quantile: float


@dataclass(frozen=True, slots=True)
class RateTable:
    """For every unit and every rate: stored bits, exact with tables and scales, and the predicted loss. Rates by ascending index
    bits.

    `loss` is `sum_c score_c * relative squared error of channel c`, measured on the fitted codebook, or modelled as `score *
    2^(-2 bits)`.
    """

    table_groups: Sequence[TableGroupInfo]
    rates: Sequence[Rate]
    bits: Int[Tensor, "u r"]
    loss: Float[Tensor, "u r"]


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Metrics by name, and one row a sample: `task, sample_id, sample_hash, type, question, answer, prediction, score`."""

    metrics: Mapping[str, float]
    samples: pd.DataFrame = field(repr=False)
