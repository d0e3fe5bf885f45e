"""What the vector codebooks share: settings, rates and their exact bits, and the fit of one table or several."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.codebook import sharing
from mgvq.codebook.layout import Layout
from mgvq.codebook.lloyd import SEEDS, kmeans
from mgvq.codebook.nearest import Nearest
from mgvq.codebook.source import Source, draw
from mgvq.codebook.tables import FittedTables
from mgvq.errors import UserError
from mgvq.formats.vector import TABLES, centroids, store_table
from mgvq.protocols import FittedCodebook
from mgvq.rng import generator
from mgvq.types import ChannelSlice, Rate

_MAX_CENTROIDS = 4096
_MIN_BITS, _MAX_BITS = 0.5, 4.0  # index bits a weight


@dataclass(frozen=True, kw_only=True)
class VectorCodebook(ABC):
    """Lloyd's k-means on the weights; a variant says which tables a rate has."""

    vector_length: int | list[int]
    """Input channels in a vector, 1 to 16; of several lengths each offers its rates."""
    share: str
    """Which channel slices share a table: `layer`, `input` or `kind` (see `sharing.table_group`). Where layers share one, each
    slice has an fp16 scale, its root mean square."""
    table: str
    """How tables are stored: `fp16`, or `int8` with an fp16 step for each table."""
    weight_power: float
    """An input channel counts with (its importance over the largest in the slice)^weight_power in the fit and in plain rounding,
    0 to 1; with 0 the importance is not looked at."""
    iterations: int
    """Lloyd's iterations, at most."""
    sample: int | None
    """Vectors per centroid that the fit looks at, drawn with replacement; None: all vectors."""
    seed: int
    """The seed of the random streams, one for each table group and subspace."""
    seeds: str = "plus_plus"
    """Where k-means begins: `plus_plus`, drawn far from each other, out of a sample; `mahalanobis`, at even places of the order
    by distance from the mean, so that the vector farthest out is one (GPTVQ)."""

    needs_gram: ClassVar[bool] = False
    follows_metric: ClassVar[bool] = True
    spans_rows: ClassVar[bool] = False
    can_be_refitted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        lengths = self._lengths()
        if not lengths or len(set(lengths)) < len(lengths) or not all(isinstance(d, int) and 1 <= d <= 16 for d in lengths):
            raise UserError(
                f"codebook.vector_length must be a whole number of 1 to 16 or a list of such, got {self.vector_length!r}"
            )
        sharing.check_share(self.share)
        if self.table not in TABLES:
            raise UserError(f"codebook.table must be {' or '.join(TABLES)}, got {self.table!r}")
        if not 0 <= self.weight_power <= 1:
            raise UserError(f"codebook.weight_power must lie in [0, 1], got {self.weight_power!r}")
        if not (isinstance(self.iterations, int) and self.iterations >= 1):
            raise UserError(f"codebook.iterations must be a whole number >= 1, got {self.iterations!r}")
        if self.seeds not in SEEDS:
            raise UserError(f"codebook.seeds must be {' or '.join(SEEDS)}, got {self.seeds!r}")
        if self.sample is not None and not (isinstance(self.sample, int) and self.sample >= 1):
            raise UserError(f"codebook.sample must be a whole number >= 1 or null, got {self.sample!r}")
        if not self.layouts:
            raise UserError(
                f"codebook.vector_length={self.vector_length!r} has no rate of {_MIN_BITS:g} to {_MAX_BITS:g} index bits a weight"
            )

    @property
    def needs_importance(self) -> bool:
        return self.weight_power > 0

    @abstractmethod
    def layout(self, vector_length: int, num_centroids: int) -> Layout:
        """The tables of that size that the variant uses."""

    def offers(self, vector_length: int, num_centroids: int) -> Sequence[Layout]:
        """The layouts of that size, each a rate."""
        return [self.layout(vector_length, num_centroids)]

    @cached_property
    def layouts(self) -> Mapping[Rate, Layout]:
        """The tables of every rate, by ascending index bits."""
        sizes = [2**w for w in range(1, _MAX_CENTROIDS.bit_length())]
        offered = [layout for d in self._lengths() for size in sizes for layout in self.offers(d, size)]
        offered = [layout for layout in offered if _MIN_BITS <= layout.index_bits <= _MAX_BITS]
        return {Rate(i.name, i.index_bits): i for i in sorted(offered, key=lambda layout: layout.index_bits)}

    def rates(self) -> Sequence[Rate]:
        return list(self.layouts)

    def distortion(self, rate: Rate) -> float:
        """`2^(-2 bits)`, the distortion-rate function of a Gaussian."""
        return 4.0**-rate.index_bits

    def table_group(self, channel_slice: ChannelSlice) -> str:
        return sharing.table_group(channel_slice, self.share)

    def storage_bits(self, slices: Sequence[ChannelSlice], rate: Rate) -> int:
        scales = 16 * len(slices) if self.scaled else 0
        return self.layouts[rate].storage_bits(slices, self.table) + scales

    @property
    def scaled(self) -> bool:
        """Whether each channel slice has a scale: where layers share tables."""
        return self.share != "layer"

    def fit(
        self,
        name: str,
        weights: Sequence[Float[Tensor, "_ _"]],
        rate: Rate,
        importance: Sequence[Float[Tensor, "_"] | None],
        flags: list[str],
    ) -> Sequence[FittedCodebook]:
        """Fit the tables of a table group; see `Codebook`.

        Flags `empty_cluster:<table group>:<number>` and `no_activation:<table group>`, whose channels then count alike. Raises
        ValueError for weights that are not finite, and UserError where importances are asked for and there are none.
        """
        if self.weight_power and any(i is not None and not i.max() > 0 for i in importance):
            flags.append(f"no_activation:{name}")
        return self._fitted(
            name, weights, rate, [self._channel_weight(w, i) for w, i in zip(weights, importance, strict=True)], flags
        )

    def _fitted(
        self,
        name: str,
        weights: Sequence[Float[Tensor, "_ _"]],
        rate: Rate,
        channel_weights: Sequence[Float[Tensor, "_"]],
        flags: list[str],
    ) -> Sequence[FittedCodebook]:
        """Fit to the weights whose channels count as `channel_weights` say; a variant may cut them into other vectors."""
        length = self.layouts[rate].vector_length
        sources = [Source.of(w, c, length, scaled=self.scaled) for w, c in zip(weights, channel_weights, strict=True)]
        return self.fit_tables(name, sources, [w.shape[1] for w in weights], rate, flags)

    def fit_tables(
        self, name: str, sources: Sequence[Source], widths: Sequence[int], rate: Rate, flags: list[str]
    ) -> Sequence[FittedTables]:
        """Fit the tables of one rate to all sources together, subspace by subspace and stage by stage.

        `widths` are the columns of the slices. Each stage is fitted to what the stages before it leave over as they are stored.
        """
        layout = self.layouts[rate]
        tables, steps, num_reseeded = [], [], 0
        subspaces = layout.num_subspaces(widths)
        for subspace in range(subspaces):
            draws = generator(self.seed, "kmeans", name, subspace)
            limit = (self.sample or 0) * layout.num_centroids
            points, weight = draw([s.subspace(subspace, subspaces) for s in sources], limit, draws)
            for stage in range(layout.stages):
                if stage:
                    reached = centroids(tables[-1], steps[-1])
                    points = points - reached[Nearest(reached)(points, weight)]
                clusters = kmeans(points, layout.num_centroids, draws, weight, self.iterations, self.seeds)
                table, step = store_table(clusters.centroids, self.table)
                tables.append(table)
                steps.append(step)
                num_reseeded += clusters.num_reseeded
        if num_reseeded:
            flags.append(f"empty_cluster:{name}:{num_reseeded}")
        table, step = torch.stack(tables), None if self.table == "fp16" else torch.stack(steps)
        return [
            FittedTables(
                table=table, step=step, stages=layout.stages, scale=s.scale, channel_weight=s.channel_weight, num_in=width
            )
            for s, width in zip(sources, widths, strict=True)
        ]

    def _lengths(self) -> list:
        return self.vector_length if isinstance(self.vector_length, list) else [self.vector_length]

    def _channel_weight(self, weight: Float[Tensor, "out c"], importance: Float[Tensor, "c"] | None) -> Float[Tensor, "c"]:
        """Return how much each channel counts, 1 for the one that counts most."""
        if self.weight_power and importance is None:
            raise UserError(
                f"codebook.weight_power={self.weight_power} weighs channels by their importance, but there are no statistics: "
                "choose a curvature and a calibration set, or codebook.weight_power=0"
            )
        if not self.weight_power or importance is None or not importance.max() > 0:
            return torch.ones(weight.shape[1], device=weight.device)
        return (importance.to(weight.device) / importance.max()).float() ** self.weight_power
