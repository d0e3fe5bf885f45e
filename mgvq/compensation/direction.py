"""The gradient of a layer, and the natural gradient along which compensations move the target of rounding."""

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.linalg import damped_solve
from mgvq.types import Metric


def natural_gradient(
    gradient: Float[Tensor, "out in"], metric: Metric, damping: float, of: str = "mean"
) -> Float[Tensor, "out in"]:
    """`(H_O + a)^-1 G (H_I + b)^-1` in float64, a and b diagonal, `damping` times `linalg.damping_unit` of the two factors.

    Rows in runs with an input factor of their own are solved with that one; a metric without an output factor has the identity
    (docs/method.md, eq. (natural-gradient)). `metric` is on the device of the gradient.
    """
    wide = gradient.double()
    natural = torch.cat([damped_solve(h_in, wide[rows].T, damping, of).T for rows, h_in in metric.row_runs(len(wide))])
    return natural if (h_out := metric.dense_h_out()) is None else damped_solve(h_out, natural, damping, of)


def without_own_error(
    gradient: Float[Tensor, "out in"], metric: Metric, error: Float[Tensor, "out in"]
) -> Float[Tensor, "out in"]:
    """The gradient as it would be at the target, from the gradient at a weight that lies `error` from it.

    The quadratic model says that they differ by `H_O E H_I`. Neither its scale nor, without an output factor, its unit is to be
    trusted, so that `c H_O E H_I` is taken away with the c >= 0 that leaves no gradient along E (docs/method.md,
    eq. (own-error)). An error of zero leaves the gradient alone.
    """
    explained = metric.gradient(error.float())
    along = float((explained * error).sum())
    share = float((gradient * error).sum()) / along if along > 0 else 0.0
    return gradient - max(0.0, share) * explained
