"""What the vector codebooks share: units, costs, the fit of one table or several, and encoding by them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mgvq.codebook.lloyd import exact_sum, kmeans
from mgvq.codebook.nearest import Nearest
from mgvq.errors import UserError
from mgvq.formats.vector import TABLES, VectorWeight, centroids, codes_bits, index_width, store_table, table_bits, to_vectors
from mgvq.rng import generator
from mgvq.types import ChannelSlice, Rate

_MAX_CENTROIDS = 4096
_MIN_BITS, _MAX_BITS = 0.5, 4.0  # index bits a weight
_SMALLEST_SCALE = 2.0**-14  # of the normal fp16 numbers


@dataclass(frozen=True, slots=True)
class Layout:
    """Tables of one rate: `turns` of them take the vectors of a row by turns, each of them a sum over `stages`."""

    vector_length: int
    num_centroids: int
    subspaces: int = 1
    stages: int = 1

    @property
    def index_bits(self) -> float:
        """Of a weight."""
        return self.stages * index_width(self.num_centroids) / self.vector_length

    @property
    def name(self) -> str:
        """`2x16`: vectors of 2, 16 centroids; `3x2x16`: three such tables by turns; `4x16+16`: two stages."""
        sizes = "+".join([str(self.num_centroids)] * self.stages)
        return f"{self.subspaces}x{self.vector_length}x{sizes}" if self.subspaces > 1 else f"{self.vector_length}x{sizes}"


@dataclass(frozen=True, kw_only=True)
class FittedTables:
    """The tables of one piece. `importance` weighs the coordinates of its vectors where no root is given; None: all alike."""

    table: Shaped[Tensor, "t k d"]  # as stored, and so is `step`
    step: Float[Tensor, "t"] | None
    stages: int
    scale: Float[Tensor, ""] | None
    channel_weight: Float[Tensor, "v d"] | None
    num_in: int

    @property
    def vector_length(self) -> int:
        return self.table.shape[2]

    @cached_property
    def _tables(self) -> Sequence[tuple[Float[Tensor, "k d"], Nearest]]:
        return [(table, Nearest(table)) for table in centroids(self.table, self.step)]

    def encode(
        self, targets: Float[Tensor, "out v d"], first: int, root: Float[Tensor, "d d"] | None
    ) -> tuple[Int[Tensor, "out v *stages"], Float[Tensor, "out v d"]]:
        """See `FittedCodebook`. Each stage takes the centroid nearest to what the stages before it leave over."""
        wide = None if root is None else root.double()
        metric = None if wide is None else wide.T @ wide
        subspaces = len(self.table) // self.stages
        if subspaces == 1 or targets.shape[1] == 1:  # the thousands of short calls of feedback rounding
            codes, values = self._encode_subspace(targets, first, metric)
        else:
            codes = torch.empty(*targets.shape[:2], self.stages, dtype=torch.int32, device=targets.device)
            values = torch.empty_like(targets)
            for start in range(min(subspaces, targets.shape[1])):
                part = slice(start, None, subspaces)
                codes[:, part], values[:, part] = self._encode_subspace(targets[:, part], first + start, metric)
        return codes.squeeze(2) if self.stages == 1 else codes, values

    def _encode_subspace(
        self, targets: Float[Tensor, "out v d"], first: int, metric: Float[Tensor, "d d"] | None
    ) -> tuple[Int[Tensor, "out v stages"], Float[Tensor, "out v d"]]:
        """Vectors `first`, `first + turns`, ... of every row, which take the same tables."""
        subspaces = len(self.table) // self.stages
        scaled = targets if self.scale is None else targets / self.scale.float()
        rest = scaled.reshape(-1, self.vector_length)
        weight = None
        if metric is None and self.channel_weight is not None:
            weight = self.channel_weight[first::subspaces][: targets.shape[1]].repeat(len(targets), 1)
        codes, values = [], torch.zeros((), device=targets.device)
        for table, find in self._tables[first % subspaces * self.stages :][: self.stages]:
            codes.append(find(rest if not codes else rest - values, weight, metric))
            values = values + table[codes[-1]]
        values = values.view_as(targets) if self.scale is None else values.view_as(targets) * self.scale.float()
        return torch.stack(codes, 1).int().view(*targets.shape[:2], -1), values

    def rows(self, part: slice) -> "FittedTables":
        del part  # all rows share the tables
        return self

    def weight(self, codes: Int[Tensor, "out v *stages"]) -> VectorWeight:
        return VectorWeight(codes.view(*codes.shape[:2], self.stages), self.table, self.num_in, self.step, self.scale)


@dataclass(frozen=True, kw_only=True)
class VectorCodebook(ABC):
    """Lloyd's k-means on the weights; a variant says which tables a rate has.

    `vector_length`: input channels a vector; of several lengths each offers its rates.
    `share`: a table for every piece (`layer`), for a group's pieces in layers that read the same activations (`input`), or in
    those of a kind (q_proj, say) in a tower (`kind`). Where layers share, each piece has an fp16 scale, its root mean square.
    `table`: `fp16`, or `int8` with an fp16 step a table.
    `weight_power`: an input channel counts with (its energy over the largest of the piece)^weight_power in fit and plain
    rounding; 0 leaves the energies unused.
    `sample`: vectors per centroid that the fit looks at, drawn with replacement; null: all.
    """

    vector_length: int | list[int]
    share: str  # layer | input | kind
    table: str  # fp16 | int8
    weight_power: float
    iterations: int
    sample: int | None
    seed: int
    spans_rows: ClassVar[bool] = False
    can_be_refitted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        lengths = self._lengths()
        if not lengths or len(set(lengths)) < len(lengths) or not all(isinstance(d, int) and 1 <= d <= 16 for d in lengths):
            raise UserError(
                f"codebook.vector_length must be a whole number of 1 to 16 or a list of such, got {self.vector_length!r}"
            )
        if self.share not in ("layer", "input", "kind"):
            raise UserError(f"codebook.share must be layer, input or kind, got {self.share!r}")
        if self.table not in TABLES:
            raise UserError(f"codebook.table must be {' or '.join(TABLES)}, got {self.table!r}")
        if not 0 <= self.weight_power <= 1:
            raise UserError(f"codebook.weight_power must lie in [0, 1], got {self.weight_power!r}")
        if not (isinstance(self.iterations, int) and self.iterations >= 1):
            raise UserError(f"codebook.iterations must be a whole number >= 1, got {self.iterations!r}")
        if self.sample is not None and not (isinstance(self.sample, int) and self.sample >= 1):
            raise UserError(f"codebook.sample must be a whole number >= 1 or null, got {self.sample!r}")
        if not self.layouts():
            raise UserError(
                f"codebook.vector_length={self.vector_length!r} has no rate of {_MIN_BITS:g} to {_MAX_BITS:g} index bits a weight"
            )

    @property
    def needs_importance(self) -> bool:
        return self.weight_power > 0

    @property
    def needs_gram(self) -> bool:
        return False

    @abstractmethod
    def layout(self, vector_length: int, num_centroids: int) -> Layout:
        """The tables of that size that the variant takes."""

    def layouts(self) -> Mapping[Rate, Layout]:
        """The tables of every rate, by ascending index bits."""
        offered = [self.layout(d, 2**w) for d in self._lengths() for w in range(1, _MAX_CENTROIDS.bit_length())]
        offered = [layout for layout in offered if _MIN_BITS <= layout.index_bits <= _MAX_BITS]
        return {Rate(i.name, i.index_bits): i for i in sorted(offered, key=lambda layout: layout.index_bits)}

    def rates(self) -> Sequence[Rate]:
        return list(self.layouts())

    def table_group(self, channel_slice: ChannelSlice) -> str:
        site = channel_slice.site
        shared = {"layer": site.name, "input": site.reads, "kind": f"{site.tower}.{site.kind}"}[self.share]
        return f"{shared}/{channel_slice.group}"

    def storage_bits(self, slices: Sequence[ChannelSlice], rate: Rate) -> int:
        layout = self.layouts()[rate]
        d, k = layout.vector_length, layout.num_centroids
        codes = sum(codes_bits(p.shape, d, k, layout.stages) for p in slices)
        scales = 16 * len(slices) if self.share != "layer" else 0
        tables = _num_subspaces(layout, [p.shape[1] for p in slices]) * layout.stages
        return codes + scales + tables * table_bits(d, k, self.table)

    def fit(
        self,
        name: str,
        weights: Sequence[Float[Tensor, "_ _"]],
        rate: Rate,
        importance: Sequence[Float[Tensor, "_"] | None],
        flags: list[str],
    ) -> Sequence[FittedTables]:
        """Flags `empty_cluster:<unit>:<number>` and `no_activation:<unit>`, whose channels then count alike.

        Raises ValueError for weights that are not finite, and UserError where energies are asked for and there are none.
        """
        layout = self.layouts()[rate]
        sources = [
            self._source(w, self._channel_weight(w, e), layout.vector_length) for w, e in zip(weights, importance, strict=True)
        ]
        if self.weight_power and any(e is not None and not e.max() > 0 for e in importance):
            flags.append(f"no_activation:{name}")
        tables, steps, num_reseeded = [], [], 0
        subspaces = _num_subspaces(layout, [w.shape[1] for w in weights])
        for subspace in range(subspaces):
            draws = generator(self.seed, "kmeans", name, subspace)
            points, weight = _draw(
                [s.subspace(subspace, subspaces) for s in sources], (self.sample or 0) * layout.num_centroids, draws
            )
            for stage in range(layout.stages):
                if stage:
                    reached = centroids(tables[-1], steps[-1])
                    points = points - reached[Nearest(reached)(points, weight)]
                clusters = kmeans(points, layout.num_centroids, draws, weight, self.iterations)
                table, step = store_table(clusters.centroids, self.table)
                tables.append(table)
                steps.append(step)
                num_reseeded += clusters.num_reseeded
        if num_reseeded:
            flags.append(f"empty_cluster:{name}:{num_reseeded}")
        stored = {
            "table": torch.stack(tables),
            "step": None if self.table == "fp16" else torch.stack(steps),
            "stages": layout.stages,
        }
        return [
            FittedTables(**stored, scale=s.scale, channel_weight=s.channel_weight, num_in=w.shape[1])
            for s, w in zip(sources, weights, strict=True)
        ]

    def _lengths(self) -> list:
        return self.vector_length if isinstance(self.vector_length, list) else [self.vector_length]

    def _source(self, weight: Float[Tensor, "out c"], channel_weight: Float[Tensor, "c"], vector_length: int) -> "Source":
        scale = None
        if self.share != "layer":
            mean = exact_sum(weight.double().square()) / weight.numel()
            scale = torch.tensor(max(mean**0.5, _SMALLEST_SCALE), device=weight.device).half()
        vectors = to_vectors(weight, vector_length)
        if weight.shape[1] % vector_length == 0 and (channel_weight == channel_weight[0]).all():
            return Source(vectors, scale, None)
        return Source(vectors, scale, to_vectors(channel_weight[None], vector_length)[0])

    def _channel_weight(self, weight: Float[Tensor, "out c"], importance: Float[Tensor, "c"] | None) -> Float[Tensor, "c"]:
        """How much each channel counts, 1 the most."""
        if self.weight_power and importance is None:
            raise UserError(
                f"codebook.weight_power={self.weight_power} weighs channels by their energy, but there are no statistics: "
                "choose a curvature and a calibration set, or codebook.weight_power=0"
            )
        if not self.weight_power or importance is None or not importance.max() > 0:
            return torch.ones(weight.shape[1], device=weight.device)
        return (importance.to(weight.device) / importance.max()).float() ** self.weight_power


@dataclass(frozen=True, slots=True)
class Source:
    """The vectors of a piece, its scale, and the weight of their coordinates: 0 for padding; None: all alike.

    `rows`: the weight of whole rows beside that, in the fit alone.
    """

    vectors: Float[Tensor, "out v d"]
    scale: Float[Tensor, ""] | None
    channel_weight: Float[Tensor, "v d"] | None
    rows: Float[Tensor, "out"] | None = None

    def subspace(self, subspace: int, subspaces: int) -> "Source":
        """Every `turns`-th vector of a row."""
        channel_weight = None if self.channel_weight is None else self.channel_weight[subspace::subspaces]
        return Source(self.vectors[:, subspace::subspaces], self.scale, channel_weight, self.rows)


def _draw(
    sources: Sequence[Source], limit: int, draws: torch.Generator
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"] | None]:
    """At most `limit` vectors of all sources (0: all of them), over their scales, and the importance of their coordinates."""
    sizes = [s.vectors.shape[0] * s.vectors.shape[1] for s in sources]
    total = sum(sizes)
    chosen = torch.randint(total, (limit,), generator=draws).unique() if 0 < limit < total else torch.arange(total)
    points, weight, start = [], [], 0
    for source, size in zip(sources, sizes, strict=True):
        own = chosen[(chosen >= start) & (chosen < start + size)].to(source.vectors.device) - start
        start += size
        per_row = max(1, source.vectors.shape[1])
        found = source.vectors[own // per_row, own % per_row].float()
        points.append(found if source.scale is None else found / source.scale.float())
        counts = torch.ones_like(found) if source.channel_weight is None else source.channel_weight[own % per_row]
        weight.append(counts if source.rows is None else counts * source.rows[own // per_row, None])
    plain = all(s.channel_weight is None and s.rows is None for s in sources)
    return torch.cat(points), None if plain else torch.cat(weight)


def _num_subspaces(layout: Layout, widths: Sequence[int]) -> int:
    """Tables that are used and stored: pieces of few vectors do not come to the last ones."""
    return min(layout.subspaces, max(-(-width // layout.vector_length) for width in widths))
