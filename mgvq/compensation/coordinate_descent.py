"""Coordinate descent over codes: each vector is rounded anew given all others, in the exact quadratic of the layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.compensation.hessian import Hessian
from mgvq.compensation.ldlq import rounding_order
from mgvq.errors import UserError
from mgvq.linalg import damped
from mgvq.protocols import FittedSlice, rows_together
from mgvq.types import Metric


@dataclass(frozen=True, kw_only=True)
class CoordinateDescent(Hessian):
    """`Hessian`, and then `sweeps` over all vectors in its order, each given all others (AQLM; GuidedQuant's LNQ).

    With the damped `H`, the error `Delta = W - W^` and the columns c of a vector, `tr(Delta H Delta^T)` as a function of its code
    is the squared distance, in the metric `H_cc`, from `W_c + (sum_{i not in c} Delta_i H_ic) H_cc^-1` (docs/method.md,
    eq. (coordinate)). That is what the codebook looks for; a code that it finds replaces the old one only where it is nearer, so
    that no step raises the objective. Rows are independent; a code of several rows is judged by their sum.

    Flags are those of `Hessian`; a metric without any positive entry leaves its codes as they are.
    """

    sweeps: int
    """How often all vectors are gone through, 1 or more; it ends where nothing changes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.sweeps, int) and self.sweeps >= 1):
            raise UserError(
                f"compensation.sweeps must be a whole number >= 1, got {self.sweeps!r}; for none: compensation=hessian"
            )

    def round(
        self,
        weight: Float[Tensor, "out in"],
        metric: Metric | None,
        slices: Sequence[FittedSlice],
        score: Float[Tensor, "in"],
        flags: list[str],
    ) -> Sequence[Tensor]:
        codes = [c.clone() for c in super().round(weight, metric, slices, score, flags)]
        assert metric is not None, "the pipeline checks needs_metric"
        order = rounding_order(slices, self.priority(score, slices))[::-1]
        for rows, h_in in metric.to(weight.device).row_runs(len(weight)):
            descent = _Descent(weight[rows].float(), damped(h_in, self.damping, self.damping_of), slices, rows, codes)
            for _ in range(self.sweeps):
                if not any([descent.step(p, v) for p, v in order]):
                    break
        return codes


class _Descent:
    """The rows of one input factor: their weights, what their codes stand for, and the error's products with the metric."""

    def __init__(
        self, weight: Float[Tensor, "rows in"], h: Tensor, slices: Sequence[FittedSlice], rows: slice, codes: Sequence[Tensor]
    ) -> None:
        self._slices, self._weight, self._rows = slices, weight, len(weight)
        self._codebooks = [fitted.codebook.rows(rows) for fitted in slices]
        self._together = [rows_together(codebook) for codebook in self._codebooks]
        parts = zip(codes, self._together, strict=True)
        self._codes = [c[rows.start // run : -(-rows.stop // run)] for c, run in parts]  # views: what is written stays
        self._columns = [fitted.channel_slice.columns.to(weight.device).long() for fitted in slices]
        values = torch.zeros_like(weight)
        for codebook, own, columns in zip(self._codebooks, self._codes, self._columns, strict=True):
            values[:, columns] = codebook.weight(own).decode()
        self._h, self._h64 = h.float(), h
        self._error = weight - values
        self._product = self._error @ self._h

    def step(self, p: int, v: int) -> bool:
        """Choose the codes of one vector anew; whether any has changed."""
        codebook, run = self._codebooks[p], self._together[p]
        length = codebook.vector_length
        columns = self._columns[p][v * length : (v + 1) * length]
        own = self._h64[columns[:, None], columns]
        root = torch.linalg.cholesky(own, upper=True)
        error = self._error[:, columns]
        pull = torch.cholesky_solve((self._product[:, columns] - error @ own.float()).double().T, root, upper=True).T.float()
        aim = self._weight[:, columns] + pull
        padded = torch.nn.functional.pad(aim, (0, length - len(columns)))
        wide = torch.zeros(length, length, device=aim.device)
        wide[: len(columns), : len(columns)] = root.float()
        codes, values = codebook.encode(padded[:, None], v, wide)
        values = values[:, 0, : len(columns)]
        old = self._weight[:, columns] - error
        gain = ((aim - old) @ root.T.float()).square().sum(1) - ((aim - values) @ root.T.float()).square().sum(1)
        gain = torch.nn.functional.pad(gain, (0, -self._rows % run)).view(-1, run).sum(1)
        nearer = gain > 1e-6 * (aim @ root.T.float()).square().sum() / max(1, len(gain))
        if not nearer.any():
            return False
        self._codes[p][nearer, v] = codes[nearer, 0]
        rows = nearer.repeat_interleave(run)[: self._rows]
        change = (old - values) * rows[:, None]
        self._error[:, columns] += change
        self._product += change @ self._h[columns]
        return True
