"""What the variants of every stage have to offer; the carriers that they take and give are in `mgvq.types`.

Dimension names are those of `mgvq.types`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.types import Batch, ChannelSlice, EvalResult, Metric, Needs, Rate, RateTable, Site, StatsBank


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


@runtime_checkable
class FittedCodebook(Protocol):
    """A codebook fitted to one channel slice, whose columns are encoded in runs of `vector_length`, padded with zeros."""

    @property
    def vector_length(self) -> int: ...
    def encode(
        self, targets: Float[Tensor, "out v d"], first: int, root: Float[Tensor, "d d"] | None
    ) -> tuple[Tensor, Float[Tensor, "out v d"]]:
        """Return the codes of the vectors `first`, `first + 1`, ... of every row, and what they stand for.

        Codes are integers of shape "out v stages" ("runs v stages" where one code stands for a run of rows). Each vector x takes
        the code c that is nearest in |root (x - c)|; with None, as the codebook itself weighs its channels.
        """
        ...

    def rows(self, part: slice) -> "FittedCodebook":
        """Return the same for a run of the slice's rows."""
        ...

    def weight(self, codes: Tensor) -> QuantizedWeight:
        """Return the stored slice from the codes of all its vectors."""
        ...


@runtime_checkable
class Codebook(Protocol):
    """Offers rates, fits the channel slices of a table group at one of them, and predicts its exact bits from shapes alone."""

    @property
    def needs_importance(self) -> bool:
        """Whether the fit looks at the importance of channels."""
        ...

    @property
    def needs_gram(self) -> bool:
        """Whether it takes the importance of pairs of channels (`Metric.mean_gram`) instead of that of single ones."""
        ...

    @property
    def follows_metric(self) -> bool:
        """Whether `FittedCodebook.encode` looks for the nearest code in the metric of its root; False: the Euclidean nearest
        always, as of a lattice."""
        ...

    def rates(self) -> Sequence[Rate]: ...
    def table_group(self, channel_slice: ChannelSlice) -> str:
        """Return the name of the slice's table group: slices of one name share a table and a rate."""
        ...

    def storage_bits(self, slices: Sequence[ChannelSlice], rate: Rate) -> int:
        """Return the exact bits that the slices of one table group take, tables and scales included."""
        ...

    def fit(
        self,
        name: str,
        weights: Sequence[Float[Tensor, "out c"]],
        rate: Rate,
        importance: Sequence[Float[Tensor, "c"] | Float[Tensor, "c c"] | None],
        flags: list[str],
    ) -> Sequence[FittedCodebook]:
        """Return one fitted codebook for each weight; fallbacks that were taken are appended to `flags`.

        `name` is that of the table group, and names the random stream of the fit. `importance` says for each weight how much its
        input channels count (`Metric.channel_importance`); None: all alike.
        """
        ...


@runtime_checkable
class Sensitivity(Protocol):
    """Gives a score >= 0 to every input channel: the larger, the more the loss grows when the channel is quantised coarsely.

    A score is read as the increase for a *relative* squared error of 1 of the channel's weights; only ratios matter.
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


@runtime_checkable
class Allocation(Protocol):
    """Chooses the rate of every table group (an index into `table.rates`), all of them within `budget_bits` stored bits.

    Raises UserError where no choice fits.
    """

    @property
    def distortion(self) -> Literal["measured", "gaussian"] | None:
        """How the loss in the table is to be predicted; None where it is not looked at."""
        ...

    def __call__(self, table: RateTable, budget_bits: int) -> Int[Tensor, "u"]: ...


@dataclass(frozen=True, slots=True)
class FittedSlice:
    """A channel slice with its codebook."""

    channel_slice: ChannelSlice
    """Which columns of which layer."""
    codebook: FittedCodebook
    """What they are rounded to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedSlice:
    """A channel slice whose codes are chosen."""

    fitted: FittedSlice
    """The slice and its codebook."""
    codes: Int[Tensor, "_ v stages"]
    """The codes of all its vectors."""
    target: Float[Tensor, "out in"]
    """The layer's weights less what the other slices stand for: in the slice's own columns the weights as they were rounded, in
    the others the errors made there, which move the optimum of this slice through the metric."""
    metric: Metric
    """The metric of the layer."""


@runtime_checkable
class Refit(Protocol):
    """Moves the tables of one table group to where its chosen codes serve best: one codebook a slice, never a worse one.

    All slices share their tables and are of different layers.
    """

    rounds: int
    """How often the layers are rounded and refitted."""

    def can_refit(self, codebook: Codebook) -> bool:
        """Whether the refit knows how to move the tables of this codebook."""
        ...

    def __call__(self, slices: Sequence[CodedSlice]) -> Sequence[FittedCodebook]: ...


@runtime_checkable
class Compensation(Protocol):
    """Rounds one layer to the codes of every channel slice; `score` (one a channel) gives the order.

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
        slices: Sequence[FittedSlice],
        score: Float[Tensor, "in"],
        flags: list[str],
    ) -> Sequence[Tensor]: ...


@runtime_checkable
class TargetShift(Protocol):
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


@runtime_checkable
class Task(Protocol):
    """Evaluates a model against its full-precision reference."""

    def __call__(self, model: torch.nn.Module, reference: torch.nn.Module | None, processor: Any, label: str) -> EvalResult: ...


@runtime_checkable
class ReadsData(Task, Protocol):
    """A task whose questions may be missing. `check` raises UserError where they are; called before a model is loaded."""

    def check(self) -> None: ...
