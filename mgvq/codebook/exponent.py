"""Any codebook on layers of any size: weights that tables in fp16 cannot hold are fitted and stored relative to a power of two.

`up_proj` times 2^-22 and `down_proj` times 2^22 are the same function; without this the tables of the one would be zeros and
those of the other infinite. Ordinary layers are left as they are, to the byte.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from mgvq.errors import UserError
from mgvq.formats.exponent import ExponentWeight
from mgvq.protocols import Codebook, FittedCodebook, rows_together
from mgvq.types import Rate

_SMALLEST, _LARGEST = -10, 12  # the powers of two between which the largest weight of an ordinary layer lies
_LIMIT = 120  # float32 holds 2^-126 to 2^127


@dataclass(frozen=True)
class FittedExponent:
    """A codebook that was fitted to `2^-exponent` times the weights of its slice."""

    codebook: FittedCodebook
    """What the scaled weights are rounded to."""
    exponent: int
    """The power of two."""

    @property
    def vector_length(self) -> int:
        return self.codebook.vector_length

    @property
    def rows_together(self) -> int:
        return rows_together(self.codebook)

    def encode(
        self, targets: Float[Tensor, "out v d"], first: int, root: Float[Tensor, "d d"] | None
    ) -> tuple[Tensor, Float[Tensor, "out v d"]]:
        """See `FittedCodebook`; the nearest code is the same at any scale."""
        codes, values = self.codebook.encode(targets * 2.0**-self.exponent, first, root)
        return codes, values * 2.0**self.exponent

    def rows(self, part: slice) -> "FittedExponent":
        return replace(self, codebook=self.codebook.rows(part))

    def weight(self, codes: Tensor) -> ExponentWeight:
        return ExponentWeight(self.codebook.weight(codes), self.exponent)  # type: ignore[arg-type]


def exponent_of(weight: Float[Tensor, "..."]) -> int:
    """The e for which `2^-e weight` has its largest magnitude in [1/2, 1); 0 where it lies in [2^-10, 2^12), or is 0.

    Below 2^-10 the step of fp16's subnormal numbers, 2^-24, begins to matter; above 2^12 a refit may leave the range.
    """
    largest = float(weight.abs().max())
    if largest == 0 or not math.isfinite(largest) or 2.0**_SMALLEST <= largest < 2.0**_LARGEST:
        return 0
    return max(-_LIMIT, min(_LIMIT, math.frexp(largest)[1]))


def fit_in_range(
    codebook: Codebook,
    name: str,
    weights: Sequence[Float[Tensor, "_ _"]],
    rate: Rate,
    importance: Sequence[Float[Tensor, "_"] | Float[Tensor, "_ _"] | None],
    flags: list[str],
) -> Sequence[FittedCodebook]:
    """`codebook.fit` on weights in the range of fp16; raises UserError with the name of the table group for what it refuses."""
    exponents = [exponent_of(weight) for weight in weights]
    scaled = [w * 2.0**-e if e else w for w, e in zip(weights, exponents, strict=True)]
    try:
        fitted = codebook.fit(name, scaled, rate, importance, flags)
    except ValueError as error:
        raise UserError(f"the codebook of {name} cannot be fitted: {error}") from error
    in_range: list[FittedCodebook] = [FittedExponent(f, e) if e else f for f, e in zip(fitted, exponents, strict=True)]
    return in_range
