"""The scales of codes that are made for a Gaussian: what a slice's root mean square makes of the measured ones."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-24, 65000.0  # of the fp16 numbers above 0


def gaussian_scales(weight: Float[Tensor, "out c"], factors: Sequence[float]) -> Float[Tensor, "k"]:
    """The root mean square of the weight times each factor, fp16 and above 0, on the weight's device.

    Raises ValueError for weights that are not finite, or too large for fp16.
    """
    size = float(weight.double().square().mean().sqrt())
    if not size * max(factors) < _LARGEST_SCALE:
        raise ValueError(f"weights must be finite and below {_LARGEST_SCALE:g}, got a root mean square of {size:g}")
    return torch.tensor([max(size * factor, _SMALLEST_SCALE) for factor in factors], device=weight.device).half()
