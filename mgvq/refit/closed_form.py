"""The centroids that are best for codes that are chosen already, in closed form."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mgvq.codebook.exponent import FittedExponent
from mgvq.codebook.tables import FittedTables
from mgvq.errors import UserError
from mgvq.formats.vector import centroids, store_table, to_vectors
from mgvq.linalg import DAMPING_OF, DiagonalPlusLowRank, damped, row_runs
from mgvq.protocols import CodedSlice, FittedCodebook
from mgvq.refit.by_centroid import rows_by_centroid

Tables = Float[Tensor, "t k d"]

_STEPS = 50  # steps of the conjugate gradients, at most: enough for 256 centroids of length 4
_PRECISION = 1e-5  # the size of the gradient, relative to the first one, at which they end: finer than what tables are stored in
# Rows are summed by centroid where reading the sums takes less time than multiplying with the factor, which is up to one centroid
# for so many rows times coordinates, ...
_FEWER = 16
_ROOM = 2**24  # ... and where the sums are no more numbers than this, or than the factor has


@dataclass(frozen=True, kw_only=True)
class ClosedForm:
    """Minimises `1/2 sum tr(h_out D h_in D^T)` over the tables of a table group, D the error of each of its layers.

    Both factors are damped, so that directions in which the calibration samples see nothing count too: without that a layer with
    few massive channels trades the whole of its weights for these (docs/method.md, eq. (refit)).

    With the codes given D is linear in the centroids. Conjugate gradients start from the present centroids, in float64, scaled by
    the diagonals of the factors, and each step costs a product with either factor. Where there are many rows for each centroid
    the rows of `h_out` are summed by centroid once, before anything is multiplied with them. A centroid that no code names stays,
    and where the metric leaves a choice the present centroids decide. The result is stored as the tables were (fp16, or int8 with
    its step); unless it is better than they are after that rounding, in the damped metric, the slices keep their tables: the
    objective never rises. Raises UserError for centroids beyond fp16.
    """

    rounds: int
    """How often the layers are rounded and refitted, 1 or more."""
    damping: float
    """The share of their diagonals that is added to both factors, in [0, 1]; `damping_of` says how."""
    damping_of: str = "mean"
    """What `damping` is a share of: the `mean` of the diagonal, its `median`, or each `channel`'s own entry
    (`linalg.damping_unit`)."""

    def __post_init__(self) -> None:
        if not (isinstance(self.rounds, int) and self.rounds >= 1):
            raise UserError(f"refit.rounds must be a whole number >= 1, got {self.rounds!r}; refit=none leaves the tables alone.")
        if not 0 <= self.damping <= 1:
            raise UserError(f"refit.damping must lie in [0, 1], got {self.damping!r}")
        if self.damping_of not in DAMPING_OF:
            raise UserError(f"refit.damping_of must be one of {', '.join(DAMPING_OF)}; got {self.damping_of!r}")

    def __call__(self, slices: Sequence[CodedSlice]) -> Sequence[FittedCodebook]:
        old = _tables(slices[0])[0]
        terms = [_Term(channel_slice, self.damping, self.damping_of) for channel_slice in slices]
        start = centroids(old.table, old.step).double()

        def total(parts: Sequence[Tables]) -> Tables:
            return torch.stack(list(parts)).sum(0)

        def curvature(move: Tables) -> Tables:
            return total([term.curvature(move) for term in terms])

        gradient = total([term.gradient(start) for term in terms])
        found = start + _conjugate_gradients(curvature, -gradient, total([term.diagonal(start) for term in terms]))
        try:
            table, step = _stored(found, old)
        except ValueError as error:
            name = slices[0].fitted.channel_slice.site.name
            raise UserError(f"the refit of the tables of {name} leaves their range: {error}; set refit=none") from error
        move = centroids(table, step).double() - start
        change = float((move * (gradient + 0.5 * curvature(move))).sum())
        return [_moved(s.fitted.codebook, table, step) if change < 0 else s.fitted.codebook for s in slices]


def _tables(channel_slice: CodedSlice) -> tuple[FittedTables, float]:
    """Return the tables of a slice and what their centroids are multiplied by."""
    codebook, factor = channel_slice.fitted.codebook, 1.0
    if isinstance(codebook, FittedExponent):
        codebook, factor = codebook.codebook, 2.0**codebook.exponent
    assert isinstance(codebook, FittedTables), "Codebook.can_be_refitted says so"
    return codebook, factor if codebook.scale is None else factor * float(codebook.scale)


def _moved(codebook: FittedCodebook, table: Shaped[Tensor, "t k d"], step: Float[Tensor, "t"] | None) -> FittedCodebook:
    """Return the codebook with other tables."""
    if isinstance(codebook, FittedExponent):
        return replace(codebook, codebook=_moved(codebook.codebook, table, step))
    assert isinstance(codebook, FittedTables), "Codebook.can_be_refitted says so"
    return replace(codebook, table=table, step=step)


class _Term:
    """What one layer adds to the objective, as a function of all centroids."""

    def __init__(self, channel_slice: CodedSlice, damping: float, of: str) -> None:
        fitted, self.scale = _tables(channel_slice)
        num_tables, num_centroids, length = fitted.table.shape
        stages, device = fitted.stages, channel_slice.codes.device
        codes = channel_slice.codes.long()
        subspace = torch.arange(codes.shape[1], device=device) % (num_tables // stages)
        table = subspace[:, None] * stages + torch.arange(stages, device=device)
        # The place of every vector's centroids in the tables laid end to end.
        self.entries = (table * num_centroids + codes).flatten(0, 1)
        self.columns, self.target = channel_slice.fitted.channel_slice.columns.to(device).long(), channel_slice.target.double()
        h_out = channel_slice.metric.h_out
        self.h_out = None
        if isinstance(h_out, DiagonalPlusLowRank):
            self.h_out = h_out.to(device).damped(damping, of)
        elif h_out is not None:
            self.h_out = damped(h_out.to(device), damping, of)
        self.h_in = [damped(h.to(device), damping, of)[:, self.columns] for h in channel_slice.metric.h_in]
        self.h_own = [h[self.columns] for h in self.h_in]
        self.summed = self._summed(codes, num_centroids, length)

    def gradient(self, tables: Tables) -> Tables:
        error = -self.target
        error[:, self.columns] += self._decode(tables)
        return self._weighed(error, self.h_in, tables)

    def curvature(self, move: Tables) -> Tables:
        """Return the second derivative times `move`."""
        return self._weighed(self._decode(move), self.h_own, move)

    def diagonal(self, like: Tables) -> Tables:
        """Return the second derivative's diagonal as it would be if the factors were their diagonals."""
        runs = zip(row_runs(len(self.target), len(self.h_own)), self.h_own, strict=True)
        columns = torch.cat([h.diagonal().expand(rows.stop - rows.start, -1) for rows, h in runs])
        rows = 1.0 if self.h_out is None else self.h_out.diagonal()[:, None]
        return self._collect(self.scale * columns * rows, like)

    def _decode(self, tables: Tables) -> Float[Tensor, "out c"]:
        vectors = tables.flatten(0, 1).index_select(0, self.entries.flatten())
        if (stages := self.entries.shape[1]) > 1:
            vectors = vectors.unflatten(0, (-1, stages)).sum(1)
        return self.scale * vectors.view(len(self.target), -1)[:, : len(self.columns)]

    def _weighed(self, error: Float[Tensor, "out a"], h_in: Sequence[Float[Tensor, "a c"]], like: Tables) -> Tables:
        """`h_out D h_in`, where each run of rows has its own input factor, summed by centroid."""
        runs = zip(row_runs(len(self.target), len(h_in)), h_in, strict=True)
        parts = [(rows, error[rows] @ h) for rows, h in runs]
        if self.summed is not None:
            vectors = to_vectors(self.scale * parts[0][1], like.shape[2]).transpose(0, 1)
            found = self.summed @ vectors  # "v stages*k d"
            subspaces = len(like) * like.shape[1] // found.shape[1]
            folded = torch.nn.functional.pad(found, (0, 0, 0, 0, 0, -len(found) % subspaces)).unflatten(0, (-1, subspaces))
            return folded.sum(0).view_as(like)
        return self._collect(torch.cat([p if self.h_out is None else self.h_out[rows, rows] @ p for rows, p in parts]), like)

    def _collect(self, values: Float[Tensor, "out c"], like: Tables) -> Tables:
        """The transpose of `_decode`."""
        stages = self.entries.shape[1]
        vectors = to_vectors(self.scale * values, like.shape[2]).flatten(0, 1)
        sums = torch.zeros_like(like).flatten(0, 1)
        return sums.index_add_(0, self.entries.flatten(), vectors.repeat_interleave(stages, 0)).view_as(like)

    def _summed(self, codes: Int[Tensor, "out v stages"], num_centroids: int, length: int) -> Float[Tensor, "v sums out"] | None:
        """The rows of `h_out` summed by the centroid that they name, by vector and stage; None where that saves nothing."""
        num_out, num_vectors, stages = codes.shape
        num_sums = stages * num_centroids
        if len(self.h_in) > 1 or not isinstance(self.h_out, Tensor) or num_sums * _FEWER > num_out * length:
            return None
        if num_vectors * num_sums * num_out > max(_ROOM, self.h_out.numel()):
            return None
        return rows_by_centroid(self.h_out, codes.flatten(1), num_centroids).view(num_vectors, num_sums, num_out)


def _stored(tables: Tables, old: FittedTables) -> tuple[Shaped[Tensor, "t k d"], Float[Tensor, "t"] | None]:
    """Return the tables as `old` is stored."""
    kind = "fp16" if old.step is None else "int8"
    stored = [store_table(table.float(), kind) for table in tables]
    steps = [step for _, step in stored if step is not None]
    return torch.stack([table for table, _ in stored]), torch.stack(steps) if steps else None


def _conjugate_gradients(product: Callable[[Tables], Tables], right: Tables, scale: Tables) -> Tables:
    """Solve `product(x) = right` for a positive semidefinite product, from 0; positive entries of `scale` precondition it."""
    inverse = torch.where(scale > 0, 1 / scale, 1.0)
    solution, residual, direction = torch.zeros_like(right), right, inverse * right
    size = float((residual * direction).sum())
    limit = _PRECISION**2 * float(residual.square().sum())
    for _ in range(_STEPS):
        bent = product(direction)
        bend = float((direction * bent).sum())
        if bend <= 0 or float(residual.square().sum()) <= limit:  # no curvature that way but that of rounding errors, or done
            break
        solution = solution + size / bend * direction
        residual = residual - size / bend * bent
        scaled = inverse * residual
        last, size = size, float((residual * scaled).sum())
        direction = scaled + size / last * direction
    return solution
