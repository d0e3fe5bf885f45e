"""The linear algebra that several stages share; a leaf that knows tensors and nothing of layers or statistics."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

DAMPING_OF = ("mean", "median", "channel")  # what dampings are shares of: see `damping_unit`
_LEAST = 1e-8  # of the mean diagonal: what a dead channel, or a median of dead channels, counts as in damping
_ITERATIONS = 4  # of the subspace that stands for a matrix's largest eigenvectors


def row_runs(num_rows: int, number: int) -> list[slice]:
    """The rows of a matrix in at most `number` consecutive runs of `ceil(num_rows / number)` rows, the last one shorter.

    This is how `torch.chunk` cuts: 5 rows in 4 runs are 3 runs (2, 2 and 1 rows).
    """
    size = -(-num_rows // number)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def second_moment(sums: Sequence[Float[Tensor, "*shape"]], counts: Sequence[int | float]) -> Float[Tensor, "*shape"]:
    """`E[x x^T]` from sums of `x x^T` (or of their diagonals) over disjoint sets of tokens and the sizes of the sets.

    The dtype is that of the sums. Without any token the sums, which are zeros, come back as they are.
    """
    return torch.stack(list(sums)).sum(0) / (sum(counts) or 1)


def damping_unit(diagonal: Float[Tensor, "n"], of: str) -> Float[Tensor, "n"]:
    """What a share of damping is a share of, channel by channel, from the diagonal of a positive semidefinite matrix.

    The mean of the diagonal, its median (where few channels are so large that they alone make the mean), or each channel's own
    entry (so that channels can be scaled against each other without moving anything). None is below 1e-8 of the mean, and the
    mean of zeros counts as 1e-30.
    """
    mean = diagonal.mean().clamp(min=1e-30)
    if of == "mean":
        return mean.expand_as(diagonal)
    own = diagonal if of == "channel" else diagonal.median().expand_as(diagonal)
    return torch.maximum(own, _LEAST * mean)


def damped(matrix: Float[Tensor, "n n"], share: float, of: str = "mean") -> Float[Tensor, "n n"]:
    """`matrix + share * diag(damping_unit)` in float64, positive definite for a positive semidefinite matrix and `share > 0`."""
    return _damp(_wide(matrix), share, of)


def _damp(wide: Float[Tensor, "n n"], share: float, of: str) -> Float[Tensor, "n n"]:
    wide.diagonal().add_(share * damping_unit(wide.diagonal(), of))
    return wide


def damped_solve(
    matrix: Float[Tensor, "n n"], right: Float[Tensor, "n k"], share: float, of: str = "mean"
) -> Float[Tensor, "n k"]:
    """`damped(matrix, share, of)^-1 right` in float64, by Cholesky; raises `torch.linalg.LinAlgError` for one that has none.

    The factor takes the place of the damped matrix, column by column as LAPACK has it: of the widest layers of a large model each
    copy is a fifth of a gigabyte.
    """
    by_columns = torch.empty(matrix.shape, dtype=torch.float64, device=matrix.device).mT.copy_(matrix)
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(_damp(by_columns, share, of), check_errors=True, out=(by_columns, info))
    return torch.cholesky_solve(right.double(), by_columns)


@dataclass(frozen=True, slots=True)
class DiagonalPlusLowRank:
    """`diag(d) + U U^T`, which takes the place of a matrix in products, at `2 n r` multiplications a column instead of `n^2`."""

    rest: Float[Tensor, "n"]
    """d, what `U U^T` leaves of the matrix's diagonal; never negative."""
    factor: Float[Tensor, "n r"]
    """U."""

    @classmethod
    def of(cls, matrix: Float[Tensor, "n n"], rank: int) -> "DiagonalPlusLowRank":
        """A positive semidefinite matrix with its diagonal as it is, and of the rest what `rank` directions hold; in its dtype.

        `U U^T = F Q (Q^T F Q)^+ Q^T F` (Nystroem) leaves a positive semidefinite rest whatever Q is. Q comes from four iterations
        of the subspace of the channels with the largest diagonals, in float64, so that nothing is drawn; `rank >= n` gives the
        matrix itself, up to rounding (docs/method.md, eq. (output-rank)).
        """
        wide = matrix.double()
        basis = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
        basis = basis[:, wide.diagonal().argsort(descending=True, stable=True)[:rank]]
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(wide @ basis)[0]
        image = wide @ basis
        values, vectors = torch.linalg.eigh(basis.T @ image)
        held = values > 1e-12 * values[-1].clamp(min=0)
        factor = (image @ vectors) * torch.where(held, values.clamp(min=1e-300).rsqrt(), 0.0)
        rest = (wide.diagonal() - factor.square().sum(1)).clamp(min=0)
        return cls(rest.to(matrix.dtype), factor.to(matrix.dtype))

    def dense(self) -> Float[Tensor, "n n"]:
        """The matrix."""
        return torch.diag(self.rest) + self.factor @ self.factor.T

    def damped(self, share: float, of: str = "mean") -> "DiagonalPlusLowRank":
        """See the function of that name; in float64."""
        wide = self.to(self.rest.double())
        return DiagonalPlusLowRank(wide.rest + share * damping_unit(wide.diagonal(), of), wide.factor)

    # What follows is what a matrix offers under the same names.

    def diagonal(self) -> Float[Tensor, "n"]:
        return self.rest + self.factor.square().sum(1)

    def to(self, like: torch.device | Tensor) -> "DiagonalPlusLowRank":
        return DiagonalPlusLowRank(self.rest.to(like), self.factor.to(like))

    def __getitem__(self, rows: tuple[slice, slice]) -> "DiagonalPlusLowRank":
        """The part of some rows and the same columns."""
        return DiagonalPlusLowRank(self.rest[rows[0]], self.factor[rows[0]])

    def __matmul__(self, right: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        return self.rest[:, None] * right + self.factor @ (self.factor.T @ right)


def nearest_kronecker(
    terms: Sequence[tuple[Float[Tensor, "in in"], Float[Tensor, "out out"]]], rounds: int
) -> tuple[Float[Tensor, "in in"], Float[Tensor, "out out"]]:
    """The A and B whose `B (x) A` is nearest (Frobenius) to `sum_i B_i (x) A_i` of the terms (A_i, B_i), in float64.

    A power iteration from `B = I` (Van Loan & Pitsianis 1993; docs/method.md, eq. (kronecker)), each round of which is
    `A <- sum_i <B_i, B> A_i / |B|^2, B <- sum_i <A_i, A> B_i / |A|^2`. Both factors are combinations of the terms, so that the
    combinations alone are iterated, on the inner products of the terms. One term is met exactly after one round; where all terms
    are zero both factors are zero.
    """
    inputs, outputs = zip(*([t for t in terms if any(f.any() for f in t)] or terms[:1]), strict=True)
    inner_in, inner_out = _inner_products(inputs), _inner_products(outputs)
    share = torch.stack([b.double().trace() / len(b) for b in outputs])  # of the A_i in the first A, whose B is the identity
    for _ in range(rounds - 1):
        share = _half_step(inner_out, _half_step(inner_in, share))
    return _combined(share, inputs), _combined(_half_step(inner_in, share), outputs)


def _inner_products(matrices: Sequence[Float[Tensor, "n n"]]) -> Float[Tensor, "i i"]:
    return torch.stack([torch.stack([_wide(a).mul_(b).sum() for b in matrices]) for a in matrices])


def _wide(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """A copy in float64, to be written into: of the widest layers of a large model each is a fifth of a gigabyte."""
    return matrix.to(torch.float64, copy=True)


def _half_step(inner: Float[Tensor, "i i"], share: Float[Tensor, "i"]) -> Float[Tensor, "i"]:
    """The shares in one factor, `<., sum_j share_j .> / |sum_j share_j .|^2`, from those in the other; zeros where that is 0."""
    products = inner @ share
    norm = share @ products
    return products / norm if norm > 0 else torch.zeros_like(share)


def _combined(share: Float[Tensor, "i"], matrices: Sequence[Float[Tensor, "n n"]]) -> Float[Tensor, "n n"]:
    total = _wide(matrices[0]).mul_(share[0])
    for s, matrix in zip(share[1:], matrices[1:], strict=True):
        total += _wide(matrix).mul_(s)
    return total
