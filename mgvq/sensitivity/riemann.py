"""RSAVQ's sensitivity of a channel, which it calls Riemannian curvature energy."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.linalg import damped
from mgvq.sensitivity.channels import LayerScore, check_damping, nearest_kronecker
from mgvq.types import Needs, SiteStats


@dataclass(frozen=True, kw_only=True)
class Riemann(LayerScore):
    """The gain of a natural-gradient step of the channel alone, `1/2 G_:c^T (H_O + a I)^-1 G_:c / (H_I + b I)_cc`.

    G is the gradient of the mean answer loss for the right answers and `H_O (x) H_I` the Kronecker product nearest to its Fisher
    (Xu et al. 2025; docs/method.md, eq. (natural-gradient)). A layer without a Fisher has no natural gradient and scores 0.
    `modality` selects the curvature only: the gradient is that of all tokens. RSAVQ's "+ 1" belongs to its allocation rule and is
    not added here.
    """

    damping: float
    """a and b as a share of the mean diagonals of both factors, in (0, 1]."""
    needs: ClassVar[Needs] = Needs(gram=True, fisher=True, gradient=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping(self.damping)

    def score(self, weight: Float[Tensor, "out in"], stats: SiteStats) -> Float[Tensor, "in"]:
        assert stats.gradient is not None  # as `needs` says
        factors = nearest_kronecker(weight, stats, self.modality)
        if factors is None:
            return weight.new_zeros(weight.shape[1], dtype=torch.float64)
        gradient = stats.gradient.to(factors.h_out)
        root = torch.linalg.cholesky(damped(factors.h_out, self.damping))
        whitened = torch.linalg.solve_triangular(root, gradient, upper=False)
        return whitened.square().sum(0) / damped(factors.h_in, self.damping).diagonal() / 2
