"""What no code can do better: the rate-distortion limit of a Gaussian layer in the metric of its input and output factors.

In the eigenbases of both factors the weights of a Gaussian layer are independent, of variance sigma^2, and the squared error of
weight (i, j) counts mu_i lambda_j. The least `sum mu_i lambda_j sigma^2 d_ij` at a rate of `sum 1/2 log2(1 / d_ij)` bits, d <= 1,
leaves every weight the same damage, the water level, or its own where that is smaller (reverse water-filling: Cover and Thomas,
Elements of Information Theory, theorem 10.3.3).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

_NEGATIVE = 1e-6  # of the largest eigenvalue: further below 0 than rounding goes


def eigenvalues(factor: Float[Tensor, "n n"]) -> Float[Tensor, "n"]:
    """Ascending, float64 on the CPU, those below 0 by rounding set to 0.

    Raises ValueError for negative ones and non-finite factors.
    """
    if not torch.isfinite(factor).all():
        raise ValueError("a factor of the metric must be finite")
    values = torch.linalg.eigvalsh(factor.double()).cpu()
    if len(values) and values[0] < -_NEGATIVE * values[-1].abs():
        raise ValueError(f"a factor of the metric must be positive semidefinite, got the eigenvalue {float(values[0]):g}")
    return values.clamp(min=0)


def least_damage(inputs: Float[Tensor, "in"], outputs: Float[Tensor, "out"], bits: float) -> float:
    """The limit for variance 1 from the eigenvalues (>= 0) of both factors, at `bits` a weight.

    High rates: `N 4^-bits` times the geometric mean of all products. Eigenvalues of 0 need no bits, which go to the others.
    Without forming the products: O(out log in) a step. Raises ValueError for bits < 0.
    """
    if not bits >= 0:
        raise ValueError(f"bits a weight must be >= 0, got {bits!r}")
    columns, rows = inputs.double()[inputs > 0].sort().values, outputs.double()[outputs > 0]
    if not len(columns) or not len(rows):
        return 0.0
    logs, shift = columns.log(), rows.log()
    budget = 2 * math.log(2) * bits * len(inputs) * len(outputs)  # the sum of log(1 / d)
    above = torch.cat([logs.flip(0).cumsum(0).flip(0), logs.new_zeros(1)])  # sums of logs[j:]
    # The rate is convex, decreasing and piecewise linear in the logarithm of the level. Newton's method from a level that is too
    # low (every weight above it) therefore rises to the solution, which it meets in finitely many steps.
    level = float(logs.mean() + shift.mean()) - budget / (len(logs) * len(shift))
    while True:
        first = torch.searchsorted(logs, level - shift, right=True)  # of the weights of each row that lie above the level
        count = int((len(logs) - first).sum())
        excess = float((above[first] + (len(logs) - first) * (shift - level)).sum()) - budget
        step = excess / max(count, 1)
        if not level + step > level:
            break
        level += step
    below = torch.cat([logs.new_zeros(1), columns.cumsum(0)])  # sums of columns[:j]
    return float((rows * below[first]).sum()) + count * math.exp(level)
