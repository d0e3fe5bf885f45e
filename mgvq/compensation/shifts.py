"""Shifts of a layer's target by what the quantised prefix has already lost, as ridge regressions on the layer's inputs.

With x the layer's input under full precision, x~ that under the quantised prefix, and r what the layer should add to `W x~`, the
target is `W + E[r x~^T] (E[x~ x~^T] + l I)^-1`, l the ridge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from mgvq.errors import UserError
from mgvq.linalg import damped_solve


@dataclass(frozen=True, kw_only=True)
class Regression:
    """What the residual and the asymmetric shift share: the choice of the ridge, and the solution."""

    ridge: Sequence[float]
    """l as shares of the mean diagonal of E[x~ x~^T] to choose from, by the error on held-out samples."""

    def __post_init__(self) -> None:
        if not self.ridge or not all(isinstance(r, int | float) and r > 0 for r in self.ridge):
            raise UserError(f"compensation.shifts: ridge must be a list of numbers > 0, got {self.ridge!r}")

    def correction(
        self,
        lacking: Float[Tensor, "out in"],
        gram: Float[Tensor, "in in"],
        heldout: tuple[Float[Tensor, "out in"], Float[Tensor, "in in"]] | None,
    ) -> Float[Tensor, "out in"]:
        """What is added to the target, float64; from `E[r x~^T]` and `E[x~ x~^T]` of calibration and of held-out samples.

        Of several ridges the one with the least `E|r - C x~|^2` on the held-out samples is taken.
        """
        tries = [damped_solve(gram, lacking.T, ridge).T for ridge in self.ridge]
        if len(tries) == 1 or heldout is None:
            return tries[0]
        held, moment = (m.double() for m in heldout)
        return min(tries, key=lambda c: float(((c @ moment - 2 * held) * c).sum()))


@dataclass(frozen=True, kw_only=True)
class Residual(Regression):
    """Brings the residual stream back to full precision, at layers whose output is added to it: `o_proj` and `down_proj`.

    r is the full-precision stream behind the layer, less the present stream before it, less `W x~`. Where a norm stands between
    the projection and the stream (Gemma), r is the layer's own full-precision output less `W x~`.
    """

    of: ClassVar[Literal["stream", "output"]] = "stream"


@dataclass(frozen=True, kw_only=True)
class Asymmetric(Regression):
    """Brings a layer's own output back to full precision: r = W (x - x~) (GPTAQ, Li et al. 2025), for layers inside a block."""

    of: ClassVar[Literal["stream", "output"]] = "output"
