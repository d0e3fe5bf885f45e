"""Second-order compensation that is shrunk towards the weights as they were (FOEM)."""

from dataclasses import dataclass

from mgvq.compensation.hessian import Hessian
from mgvq.compensation.ldlq import Choose
from mgvq.errors import UserError
from mgvq.types import Metric, Site


@dataclass(frozen=True, kw_only=True)
class Foem(Hessian):
    """`Hessian` with `(1 - beta)` times its correction: vector j is rounded at `W_j + (1 - beta) sum_{i>j} Delta_i L_ij`.

    What FOEM adds as a first-order term, `beta (W' - W) H_FF` of the corrected weights W', is no gradient of the layer's
    quadratic, which is zero after the best correction. Its effect is this shrinkage, a trust region for the quadratic model
    (docs/method.md, eq. (foem)).
    """

    beta: float
    """The share of the correction that is taken back, in [0, 1]: 0 is `compensation=hessian`, 1 is plain rounding of each vector
    in the metric of its block."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise UserError(f"compensation.beta must lie in [0, 1], got {self.beta!r}")

    def choice(self, metric: Metric, site: Site, flags: list[str]) -> Choose:
        return lambda encode, target, weight: encode(target.lerp(weight, self.beta))
