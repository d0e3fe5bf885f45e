"""Layers are rounded on the inputs that the quantised layers before them give, and make up for what those have lost.

With x a layer's input at full precision, x~ its input behind the quantised prefix, and r what the layer should add to `W x~`, its
target is the ridge regression `W + E[r x~^T] (E[x~ x~^T] + l I)^-1` (docs/method.md, eq. (prefix-shift)).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mgvq.errors import UserError
from mgvq.linalg import damped_solve
from mgvq.protocols import Lacking


@dataclass(frozen=True, kw_only=True)
class QuantizedPrefix:
    """Statistics of the quantised prefix, with or without moved targets. Raises UserError for a ridge that is no list of numbers
    > 0."""

    residual: bool
    """Whether layers whose output is added to the residual stream (`o_proj`, `down_proj`) bring the stream back: r is the
    full-precision stream behind the layer, less the present stream before it, less `W x~`."""
    asymmetric: bool
    """Whether all other layers bring their own output back: r = W (x - x~) (GPTAQ, Li et al. 2025). They are the layers inside a
    block, and those with a norm between them and the stream (Gemma's `o_proj` and `down_proj`)."""
    ridge: Sequence[float]
    """l as shares of the mean diagonal of `E[x~ x~^T]`; of several each layer takes the one with the least error on the held-out
    samples."""

    def __post_init__(self) -> None:
        if not self.ridge or not all(isinstance(r, int | float) and r > 0 for r in self.ridge):
            raise UserError(f"prefix.ridge must be a list of numbers > 0, got {self.ridge!r}")

    def correction(
        self,
        of: Lacking,
        lacking: Float[Tensor, "out in"],
        gram: Float[Tensor, "in in"],
        heldout: tuple[Float[Tensor, "out in"], Float[Tensor, "in in"]] | None,
    ) -> Float[Tensor, "out in"] | None:
        """See `Prefix`; float64."""
        if not (self.residual if of == "stream" else self.asymmetric):
            return None
        best = damped_solve(gram, lacking.T, self.ridge[0]).T
        if len(self.ridge) == 1 or heldout is None:
            return best
        least = _lost(best, *heldout)
        for ridge in self.ridge[1:]:
            other = damped_solve(gram, lacking.T, ridge).T
            if (lost := _lost(other, *heldout)) < least:
                best, least = other, lost
        return best


def _lost(correction: Float[Tensor, "out in"], lacking: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]) -> float:
    """`E|r - C x~|^2` without its constant."""
    return float(((correction @ gram.double() - 2 * lacking.double()) * correction).sum())
