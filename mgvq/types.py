"""The carriers that the stages hand to each other, and the protocols that the variants of a stage meet.

Dimension names: `out in` features of a linear layer, `c` columns (input channels) of one piece, `v` vectors in a row of a piece,
`n` vectors, `d` vector length, `k` centroids, `b` batch, `s` sequence, `u` units, `r` rates.

The words of the method, from small to large. A *channel* is one input channel, a column of a weight. A *piece* is the columns of
one channel group in one layer. A *unit* is the pieces that share a codebook table, hence a rate: what the allocation decides
about.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

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

    def channel_energy(self) -> Float[Tensor, "in"]:
        """The mean diagonal of `h_in`: how much an error of an input channel counts."""
        return torch.stack([h.diagonal() for h in self.h_in]).mean(0).clamp(min=0)

    def mean_gram(self) -> Float[Tensor, "in in"]:
        """The mean of `h_in`."""
        return torch.stack(self.h_in).mean(0)


@runtime_checkable
class QuantizedWeight(Protocol):
    """A weight as it is stored. `tensors` are written as they are, so their bytes are what the weight costs.

    A tensor object that several weights hold (a shared table) is stored once.
    """

    format: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int]: ...
    def decode(self) -> Float[Tensor, "out in"]: ...
    def tensors(self) -> Mapping[str, Tensor]: ...
    def settings(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Rate:
    """One precision that a codebook offers: a name for people, and nominal index bits a weight."""

    name: str
    index_bits: float


@dataclass(frozen=True, slots=True)
class Piece:
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


@runtime_checkable
class FittedCodebook(Protocol):
    """A codebook fitted to one piece. Its columns are encoded in runs of `vector_length`, the last one padded with zeros."""

    vector_length: int

    def encode(
        self, targets: Float[Tensor, "out v d"], first: int, root: Float[Tensor, "d d"] | None
    ) -> tuple[Tensor, Float[Tensor, "out v d"]]:
        """Codes (integers, "out v" or "out v stages") of the vectors `first`, `first + 1`, ... of every row, and what they stand
        for.

        Each vector x takes the code c that is nearest in |root (x - c)|; None: as the codebook itself weighs its channels.
        """
        ...

    def rows(self, part: slice) -> "FittedCodebook":
        """The same for a run of the piece's rows."""
        ...

    def weight(self, codes: Tensor) -> QuantizedWeight:
        """The stored piece from the codes of all its vectors."""
        ...


@runtime_checkable
class Codebook(Protocol):
    """Offers rates; fits the pieces of a unit at one of them, and predicts the exact bits of that from the shapes alone.

    `energy` is how much an input channel counts (`Metric.channel_energy`), None: all alike; where `needs_gram`, how the errors of
    two channels count together (`Metric.mean_gram`). `needs_energy` says whether it is looked at. `name` names the unit: the
    random stream of the fit. Fallbacks that were taken are appended to `flags`.
    """

    @property
    def needs_energy(self) -> bool: ...
    @property
    def needs_gram(self) -> bool: ...
    def rates(self) -> Sequence[Rate]: ...
    def unit(self, piece: Piece) -> str:
        """Pieces of one name share a table and a rate."""
        ...

    def storage_bits(self, pieces: Sequence[Piece], rate: Rate) -> int: ...
    def fit(
        self,
        name: str,
        weights: Sequence[Float[Tensor, "out c"]],
        rate: Rate,
        energy: Sequence[Float[Tensor, "c"] | Float[Tensor, "c c"] | None],
        flags: list[str],
    ) -> Sequence[FittedCodebook]: ...


@runtime_checkable
class Sensitivity(Protocol):
    """A score >= 0 for every input channel: the larger, the more the loss grows when the channel is quantised coarsely.

    Read as the increase for a *relative* squared error of 1 of the channel's weights; only ratios matter.
    """

    @property
    def needs(self) -> Needs: ...
    def __call__(
        self, weights: Mapping[Site, Float[Tensor, "out in"]], bank: StatsBank
    ) -> Mapping[Site, Float[Tensor, "in"]]: ...


@runtime_checkable
class Grouping(Protocol):
    """Cuts the input channels of every layer into groups: the group of each channel, 0 .. `num_groups` - 1.

    Layers that read the same activations get the same groups, and a channel's scores are added up over them.
    """

    num_groups: int

    @property
    def needs(self) -> Needs: ...
    def __call__(self, scores: Mapping[Site, Float[Tensor, "in"]], bank: StatsBank) -> Mapping[Site, Int[Tensor, "in"]]: ...


@dataclass(frozen=True, slots=True)
class UnitInfo:
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

    units: Sequence[UnitInfo]
    rates: Sequence[Rate]
    bits: Int[Tensor, "u r"]
    loss: Float[Tensor, "u r"]


@runtime_checkable
class Allocation(Protocol):
    """The rate of every unit (an index into `table.rates`), all of them within `budget_bits` stored bits.

    `distortion`: how the table's loss is to be predicted, None where it is not looked at. Raises UserError where no choice fits.
    """

    @property
    def distortion(self) -> Literal["measured", "gaussian"] | None: ...
    def __call__(self, table: RateTable, budget_bits: int) -> Int[Tensor, "u"]: ...


@dataclass(frozen=True, slots=True)
class FittedPiece:
    """A piece with its codebook."""

    piece: Piece
    codebook: FittedCodebook


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedPiece:
    """A piece whose codes are chosen.

    `target` is what its layer lacks without it: the layer's weights, less what the other pieces stand for. In the piece's own
    columns these are the weights as they were rounded; in the others the errors made there, which move the optimum of this
    piece through the metric.
    """

    fitted: FittedPiece
    codes: Tensor
    target: Float[Tensor, "out in"]
    metric: Metric


@runtime_checkable
class Refit(Protocol):
    """Moves the tables of one unit to where its chosen codes serve best: one codebook a piece, never a worse one.

    All pieces share their tables and are of different layers. `rounds`: how often the layers are rounded, and refitted after.
    """

    rounds: int

    def can_refit(self, codebook: Codebook) -> bool: ...
    def __call__(self, pieces: Sequence[CodedPiece]) -> Sequence[FittedCodebook]: ...


@runtime_checkable
class Compensation(Protocol):
    """Rounds one layer: the codes of every piece. `score` (one a channel) gives the order; flags are appended to.

    `needs_output_metric`: the metric must have an `h_out`. One that is a `Shift` too is rounded block by block.
    """

    @property
    def needs_metric(self) -> bool: ...
    @property
    def needs_output_metric(self) -> bool: ...
    @property
    def uses_score(self) -> bool: ...
    def round(
        self,
        weight: Float[Tensor, "out in"],
        metric: Metric | None,
        pieces: Sequence[FittedPiece],
        score: Float[Tensor, "in"],
        flags: list[str],
    ) -> Sequence[Tensor]: ...


@runtime_checkable
class Shift(Protocol):
    """Moves the target of rounding by a gradient: its `source` (kl | block | sft), taken again at every block (true), every so
    many blocks or not at all (false), the steps to try, and how often all blocks are gone through."""

    source: str
    refresh: bool | int
    steps: list[float]
    sweeps: int

    def target(
        self, weight: Float[Tensor, "out in"], metric: Metric, gradient: Float[Tensor, "out in"], step: float
    ) -> Float[Tensor, "out in"]: ...


@runtime_checkable
class CalibrationSet(Protocol):
    """The gradient samples and the held-out samples, disjoint from each other and from every test question.

    `label_seed`: of the answers that are sampled from the model where the statistics ask for them. `packable`: the samples are
    questions about one image each, so that those about the same can share a row.
    """

    @property
    def label_seed(self) -> int: ...
    @property
    def packable(self) -> bool: ...
    @property
    def examples(self) -> Sequence[Any]: ...
    @property
    def heldout_examples(self) -> Sequence[Any]: ...
    def batches(self, processor: Any) -> Iterator[Batch]: ...
    def heldout(self, processor: Any) -> Iterator[Batch]: ...


@runtime_checkable
class Calibration(Protocol):
    """Draws the samples; bad data is reported here, before a model is loaded."""

    def draw(self) -> CalibrationSet: ...


@runtime_checkable
class Curvature(Protocol):
    """Turns the statistics of all layers into the metric that rounding minimises."""

    @property
    def needs(self) -> Needs: ...
    def fuse(self, bank: StatsBank) -> Mapping[Site, Metric]: ...


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Metrics by name, and one row a sample: `task, sample_id, sample_hash, type, question, answer, prediction, score`."""

    metrics: Mapping[str, float]
    samples: pd.DataFrame = field(repr=False)


@runtime_checkable
class Task(Protocol):
    """Evaluates a model against its full-precision reference."""

    def __call__(self, model: torch.nn.Module, reference: torch.nn.Module | None, processor: Any, label: str) -> EvalResult: ...


@runtime_checkable
class ReadsData(Task, Protocol):
    """A task whose questions may be missing. `check` raises UserError where they are; called before a model is loaded."""

    def check(self) -> None: ...
