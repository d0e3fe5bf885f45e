"""What the variants of every stage have to offer; the carriers that they take and give are in `mgvq.types`.

A variant *declares* what others must know of it: whoever checks that the stages of a method fit together asks for these
properties and knows no class. Dimension names are those of `mgvq.types`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.types import Batch, ChannelSlice, EvalResult, Metric, Needs, Rate, RateTable, Site, SiteStats, StatsBank


@runtime_checkable
class QuantizedWeight(Protocol):
    """A weight as it is stored. `tensors` are written as they are, so their bytes are what the weight costs.

    A tensor object that several weights hold (a shared table) is stored once. A class may also offer a kernel, `multiply(inputs,
    tensors, **settings)`, the product of few tokens with what is stored (`mgvq.kernels.linear`).
    """

    format: ClassVar[str]
    """The name under which a checkpoint stores the weight and finds its class again."""

    @property
    def shape(self) -> tuple[int, int]: ...
    def decode(self) -> Float[Tensor, "out in"]: ...
    @property
    def tunable(self) -> Mapping[str, Tensor]:
        """Those of `tensors` that are continuous, by the same roles: tables and scales, which a tuning may move. The others are
        codes: choices that are made."""
        ...

    @property
    def is_linear(self) -> bool:
        """Whether the decoded weight is linear in the tunable tensors, taken together."""
        ...

    def decoder(self) -> Callable[[Mapping[str, Tensor]], Float[Tensor, "out in"]]:
        """`decode` as a function of the tunable tensors, in any floating-point dtype, with a gradient with respect to them.

        What follows from the codes alone is computed once, when the function is made.
        """
        ...

    def tensors(self) -> Mapping[str, Tensor]: ...
    def num_weights(self) -> Mapping[str, int]:
        """The number of weights that each of the tensors stands for; a tensor that is left out stands for none, as a table."""
        ...

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
class CodesRowsTogether(FittedCodebook, Protocol):
    """A fitted codebook one of whose codes may cover several rows, so that rows are corrected from run to run of so many.

    Such a code is the plain nearest one, whatever the root and whichever the number of the vector.
    """

    @property
    def rows_together(self) -> int:
        """The rows of one code, 1 where each row has its own."""
        ...


def rows_together(codebook: FittedCodebook) -> int:
    """The rows of one code of any fitted codebook."""
    return codebook.rows_together if isinstance(codebook, CodesRowsTogether) else 1


@runtime_checkable
class Codebook(Protocol):
    """Offers rates, fits the channel slices of a table group at one of them, and predicts from the shapes alone how many bits
    that takes, exactly.
    """

    @property
    def spans_rows(self) -> bool:
        """Whether one code covers several rows: its slices are `CodesRowsTogether`, and errors are corrected from tile to tile.

        Plain rounding is not measured beside the compensation's then (`nearest` in proxy.parquet).
        """
        ...

    @property
    def can_be_refitted(self) -> bool:
        """Whether the fitted slices are `mgvq.codebook.vector.FittedTables`, whose centroids a refit may move."""
        ...

    @property
    def needs_importance(self) -> bool:
        """Whether `fit` reads the importance of the channels, for which the run needs a curvature."""
        ...

    @property
    def needs_gram(self) -> bool:
        """Whether the importance is a matrix, how the errors of two channels count together (`Metric.mean_gram`), and not one
        number a channel (`Metric.channel_importance`)."""
        ...

    @property
    def follows_metric(self) -> bool:
        """Whether `FittedCodebook.encode` looks for the nearest code in the metric of its root; False: the Euclidean nearest
        always, as of a lattice."""
        ...

    def rates(self) -> Sequence[Rate]: ...
    def distortion(self, rate: Rate) -> float:
        """The mean squared error on a Gaussian of variance 1 by which an allocation predicts losses."""
        ...

    def table_group(self, channel_slice: ChannelSlice) -> str:
        """The name of the slice's table group; slices of one name share a table and a rate."""
        ...

    def storage_bits(self, slices: Sequence[ChannelSlice], rate: Rate) -> int:
        """The exact bits that the slices of one table group take, tables and scales included."""
        ...

    def fit(
        self,
        name: str,
        weights: Sequence[Float[Tensor, "out c"]],
        rate: Rate,
        importance: Sequence[Float[Tensor, "c"] | Float[Tensor, "c c"] | None],
        flags: list[str],
    ) -> Sequence[FittedCodebook]:
        """One fitted codebook for each of the weights.

        `name` is that of the table group and names the random stream of the fit. An `importance` of None: all channels count
        alike. Fallbacks that were taken are appended to `flags`.
        """
        ...


@runtime_checkable
class LayerTransform(Protocol):
    """An equivalent problem for one layer: the metric of an error is the same before and after."""

    def weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """A weight of the layer, or a gradient with respect to it, in the problem's basis."""
        ...

    def weight_back(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The inverse of `weight`."""
        ...

    def input_factor(self, factor: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
        """An input factor of the layer's metric in the problem's basis."""
        ...

    def statistics(self, stats: SiteStats) -> SiteStats:
        """The statistics that the layer would have had in the problem's basis."""
        ...

    def stored(self) -> Sequence[Tensor]:
        """What a checkpoint has to hold to undo it, counted in the budget; one object where layers share it."""
        ...

    def wrap(self, weight: QuantizedWeight) -> QuantizedWeight:
        """A stored weight of the problem as one that decodes to the layer's own basis."""
        ...


@runtime_checkable
class Transform(Protocol):
    """Gives every layer an equivalent problem; the stages behind it work on that and do not know.

    `within=layer`: before sensitivity and grouping, which see the layers as they then are. `within=group`: after grouping, by
    the `groups` of the layers' own channels; the scores are then computed anew.
    """

    within: Literal["layer", "group"]

    def __call__(
        self, sites: Sequence[Site], groups: Mapping[Site, Int[Tensor, "_"]] | None
    ) -> Mapping[Site, LayerTransform]: ...


@runtime_checkable
class Sensitivity(Protocol):
    """Gives a score >= 0 to every input channel: the larger, the more the loss grows when the channel is quantised coarsely.

    A score is read as the increase for a *relative* squared error of 1 of the channel's weights; only ratios matter.
    """

    @property
    def needs(self) -> Needs: ...
    @property
    def needs_images(self) -> bool:
        """Whether the score turns on image tokens, so that a calibration which shows none leaves it nothing to go by."""
        ...

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
    def uses_score(self) -> bool:
        """Whether the groups follow the channels' sensitivity."""
        ...

    @property
    def needs_images(self) -> bool:
        """Whether the groups turn on image tokens, so that a calibration which shows none leaves nothing to go by."""
        ...

    @property
    def needs(self) -> Needs: ...
    def __call__(self, scores: Mapping[Site, Float[Tensor, "in"]], bank: StatsBank) -> Mapping[Site, Int[Tensor, "in"]]: ...


@runtime_checkable
class Allocation(Protocol):
    """Gives every table group its rate (an index into `table.rates`), all of them within `budget_bits` stored bits.

    Raises UserError where no choice fits.
    """

    @property
    def uses_score(self) -> bool:
        """Whether the rates follow the channels' sensitivity."""
        ...

    @property
    def distortion(self) -> Literal["measured", "gaussian"] | None:
        """How the table's loss is to be predicted; None where it is not looked at."""
        ...

    def __call__(self, table: RateTable, budget_bits: int) -> Int[Tensor, "u"]: ...


@dataclass(frozen=True, slots=True)
class FittedSlice:
    """A channel slice with the codebook that was fitted to it."""

    channel_slice: ChannelSlice
    """Which columns of which layer."""
    codebook: FittedCodebook
    """What they are rounded to."""
    distortion: float = 1.0
    """The mean squared error that a Gaussian of variance 1 has at the slice's rate (`Codebook.distortion`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedSlice:
    """A channel slice whose codes are chosen."""

    fitted: FittedSlice
    """The slice and its codebook."""
    codes: Int[Tensor, "_ v stages"]
    """The codes of all its vectors."""
    target: Float[Tensor, "out in"]
    """The layer's weights less what its other slices stand for. In the slice's own columns these are the weights as they were
    rounded; in the others the errors that were made there, which move the optimum of this slice through the metric."""
    metric: Metric
    """The metric of the whole layer."""


@runtime_checkable
class Refit(Protocol):
    """Moves the tables of one table group to where its chosen codes serve best.

    It is asked only where the codebook says `can_be_refitted`.
    """

    rounds: int
    """How often the layers are rounded, and refitted after that."""

    def __call__(self, slices: Sequence[CodedSlice]) -> Sequence[FittedCodebook]:
        """One codebook for each slice, never a worse one. The slices share their tables and are of different layers."""
        ...


@runtime_checkable
class TargetShift(Protocol):
    """Moves the target of rounding by a gradient, block by block."""

    @property
    def source(self) -> str:
        """Whose gradient it is: `kl`, the divergence from the full-precision model; `block`, the drift of a block's output;
        `sft`, the loss of the right answers."""
        ...

    @property
    def start(self) -> str:
        """What the first gradients are taken at: `rounded`, the model with all blocks rounded without one; `full_precision`, the
        model with the blocks before quantised and those behind not."""
        ...

    @property
    def refresh(self) -> bool | int:
        """The gradient is taken again at every block (true), at every so many blocks, or never (false)."""
        ...

    @property
    def minibatches(self) -> int:
        """How many parts the samples are dealt to; gradients take these in turn."""
        ...

    @property
    def steps(self) -> Sequence[float]:
        """The steps to try, as shares of a layer's norm."""
        ...

    @property
    def sweeps(self) -> int:
        """How often all blocks are gone through with gradients."""
        ...

    @property
    def racing(self) -> float | None:
        """The p-value below which a step is given up once a part of the held-out samples says that it loses; None: never."""
        ...

    def direction(self, metric: Metric, gradient: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """What targets move against, in float64; zeros for a gradient of 0. It is the same for all steps, and computed once."""
        ...

    def target(
        self, weight: Float[Tensor, "out in"], direction: Float[Tensor, "out in"], step: float
    ) -> Float[Tensor, "out in"]: ...


Lacking = Literal["stream", "output"]
"""What the layers behind the quantised prefix lack: the residual stream behind the layer, or the layer's own output."""


@runtime_checkable
class Prefix(Protocol):
    """Rounds layers in the order of the data, each in the metric of the inputs that the quantised ones before it give."""

    def correction(
        self,
        of: Lacking,
        lacking: Float[Tensor, "out in"],
        gram: Float[Tensor, "in in"],
        heldout: tuple[Float[Tensor, "out in"], Float[Tensor, "in in"]] | None,
    ) -> Float[Tensor, "out in"] | None:
        """What is added to the layer's weight before it is rounded; None: nothing.

        `lacking` is `E[r x~^T]` and `gram` `E[x~ x~^T]`: x~ is the layer's present input, and r what the layer should add to
        `W x~` for the stream (where its output goes into the residual stream) or its own output to be that of full precision.
        `heldout` are both of the held-out samples, None where there are none.
        """
        ...


@runtime_checkable
class Objective(Protocol):
    """What a tuning brings down: a loss of values in float32, by name, and how they do on held-out samples."""

    @property
    def num_batches(self) -> int:
        """How many batches there are to learn from."""
        ...

    def tokens(self, batch: int) -> int:
        """The tokens of a batch."""
        ...

    def loss(self, values: Mapping[str, Tensor], batch: int) -> Float[Tensor, ""]:
        """The mean loss over a batch, with a graph to the values."""
        ...

    def heldout(self, values: Mapping[str, Tensor]) -> float:
        """The mean loss over all held-out samples; NaN where there are none."""
        ...


@dataclass(frozen=True, slots=True)
class Descended:
    """What a tuning has come to."""

    tensors: Mapping[str, Tensor]
    """The best state, in the dtypes of the start; the very tensors of the start where that was best."""
    rows: Sequence[Mapping[str, int | float]]
    """The start and every check: `step, tokens, seconds, loss, heldout_loss`."""
    flags: Sequence[str]
    """What tables must say of it."""


@runtime_checkable
class Tuning(Protocol):
    """Moves what is continuous once codes are chosen; these stay, and so do the bits."""

    within: Literal["block", "model"]
    """Against what: a block's own output, before the next block is rounded, or the answers of the whole model in the end."""
    whole_towers: bool
    """Whether all parameters of the towers in scope are tuned, not only biases and the vectors in blocks of quantised layers."""
    embeddings: bool
    """Whether token embedding and head are tuned too."""

    def descend(self, name: str, start: Mapping[str, Tensor], objective: Objective) -> Descended:
        """From stored tensors to better ones of the same dtypes and shapes, never to worse ones by the held-out loss.

        `name` is that of the random stream.
        """
        ...


@runtime_checkable
class Compensation(Protocol):
    """Rounds one layer."""

    @property
    def needs_metric(self) -> bool:
        """Whether it weighs errors by the metric, for which the run needs a curvature."""
        ...

    @property
    def needs_output_metric(self) -> bool:
        """Whether that metric must have an output factor (`Metric.h_out`)."""
        ...

    @property
    def uses_score(self) -> bool:
        """Whether the channels' sensitivity decides what is rounded first."""
        ...

    @property
    def shift(self) -> TargetShift | None:
        """What moves the targets of rounding, block by block; None: the weights themselves are the targets."""
        ...

    def round(
        self,
        weight: Float[Tensor, "out in"],
        metric: Metric | None,
        slices: Sequence[FittedSlice],
        score: Float[Tensor, "in"],
        flags: list[str],
    ) -> Sequence[Tensor]:
        """The codes of every slice. `score` is that of the channels; fallbacks that were taken are appended to `flags`."""
        ...


@runtime_checkable
class FitsTargets(Compensation, Protocol):
    """A compensation that may have tables fitted to what its feedback makes of the weights."""

    @property
    def fits_targets(self) -> bool:
        """Whether tables are fitted again, to `met`, before the layer is rounded."""
        ...

    def met(
        self, weight: Float[Tensor, "out in"], metric: Metric, slices: Sequence[FittedSlice], score: Float[Tensor, "in"]
    ) -> Float[Tensor, "out in"]:
        """The targets that the vectors of every slice meet when the weight is rounded to the slices as they are fitted now."""
        ...


@runtime_checkable
class CalibrationSet(Protocol):
    """The gradient samples and the held-out samples, disjoint from each other and from every test question."""

    @property
    def label_seed(self) -> int:
        """The seed of the answers that are sampled from the model where the statistics ask for them."""
        ...

    @property
    def packable(self) -> bool:
        """Whether the samples are questions about one image each, so that those about the same image can share a row."""
        ...

    @property
    def examples(self) -> Sequence[Any]: ...
    @property
    def heldout_examples(self) -> Sequence[Any]: ...
    def batches(self, processor: Any) -> Iterator[Batch]: ...
    def heldout(self, processor: Any) -> Iterator[Batch]: ...


@runtime_checkable
class HasGramSamples(CalibrationSet, Protocol):
    """A calibration set that may have further samples, which the Gram alone sees; they are disjoint from the held-out ones."""

    @property
    def gram_examples(self) -> Sequence[Any]: ...
    def gram_batches(self, processor: Any) -> Iterator[Batch]: ...


@runtime_checkable
class Calibration(Protocol):
    """Draws the samples."""

    @property
    def shows_images(self) -> bool:
        """Whether samples may show images: a model that reads only text cannot take them."""
        ...

    def draw(self) -> CalibrationSet:
        """Raises UserError for bad data, before a model is loaded."""
        ...


@runtime_checkable
class Curvature(Protocol):
    """Turns the statistics of all layers into the metric that rounding minimises."""

    @property
    def has_output_factor(self) -> bool:
        """Whether every metric has an `h_out`, and a single `h_in`."""
        ...

    @property
    def needs(self) -> Needs: ...
    @property
    def needs_images(self) -> bool:
        """Whether the metric turns on image tokens, so that a calibration which shows none leaves it nothing to go by."""
        ...

    def fuse(self, bank: StatsBank) -> Mapping[Site, Metric]: ...


@runtime_checkable
class Task(Protocol):
    """Evaluates a model against its full-precision reference (`mgvq.model.reference.Reference`; its `model` is the model itself).

    What tables and plans make of its metrics is declared in its yaml (`mgvq.studies.kinds`).
    """

    @property
    def shows_images(self) -> bool:
        """Whether the questions show images: a model that reads only text cannot answer them."""
        ...

    def __call__(self, model: torch.nn.Module, reference: Any, processor: Any, label: str) -> EvalResult: ...


@runtime_checkable
class ReadsData(Task, Protocol):
    """A task whose questions may be missing. `check` raises UserError where they are; called before a model is loaded."""

    def check(self) -> None: ...


@runtime_checkable
class DrawsSamples(Task, Protocol):
    """A task that knows its samples without a model: those that are too long for one are refused before its weights are read."""

    def draw(self) -> Sequence[Any]: ...
