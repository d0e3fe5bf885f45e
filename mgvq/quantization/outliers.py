"""Which weights of a layer are taken out before anything else looks at it, and stored exactly."""

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.codebook.exponent import exponent_of
from mgvq.formats.outliers import Outliers
from mgvq.types import Metric


def find_outliers(weight: Float[Tensor, "out in"], metric: Metric | None, number: int) -> Outliers:
    """The weights with the largest `W_ij^2 (H_I)_jj`: what leaving each of them out would cost, the output factor aside.

    `weight` and `metric` are in the layer's own basis; without a metric all channels count alike. Of equal ones the first; all
    of a layer that has fewer weights. One value far outside the tables of a layer can cost more than all others together
    (SpQR, Dettmers et al. 2023; SqueezeLLM, Kim et al. 2023).
    """
    damage = weight.double().square()
    if metric is not None:
        for rows, h_in in metric.row_runs(len(weight)):
            damage[rows] *= h_in.diagonal().clamp(min=0).to(damage)
    flat = damage.flatten()
    number = min(number, len(flat))
    least = flat.topk(number).values[-1]
    above = torch.nonzero(flat > least).flatten()
    equal = torch.nonzero(flat == least).flatten()[: number - len(above)]
    chosen = torch.cat([above, equal]).sort().values
    values = weight.flatten()[chosen]
    return Outliers.of(chosen, values, exponent_of(values.float()), (weight.shape[0], weight.shape[1]))
