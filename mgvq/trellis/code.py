"""What a bit-shift trellis code is, apart from how a sequence is coded."""

from dataclasses import dataclass
from typing import Literal, get_args

Values = Literal["computed", "hybrid"]
STEPS = {0.5: (1, 2), 1.0: (1, 1), 1.5: (3, 2), 2.0: (2, 1), 3.0: (3, 1), 4.0: (4, 1)}  # rate: (bits, weights) a step
MAX_STATE_BITS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TrellisCode:
    """A state of `state_bits` (L) bits; every step shifts in `step_bits` (B) and stands for `step_weights` (V) weights.

    `s' = ((s << B) | new) mod 2^L`, B / V bits a weight (QTIP, Tseng et al. 2024). `values`: how a state's number
    gives its weights (`mgvq.trellis.values`). Raises ValueError for sizes outside L <= 16, B of 1 to 4, V of 1 or 2, B < L.
    """

    state_bits: int
    step_bits: int
    step_weights: int
    values: Values

    def __post_init__(self) -> None:
        if not (1 <= self.step_bits <= 4 and self.step_weights in (1, 2)):
            raise ValueError(f"a step has 1 to 4 bits and 1 or 2 weights, got {self.step_bits} and {self.step_weights}")
        if not self.step_bits < self.state_bits <= MAX_STATE_BITS:
            raise ValueError(f"state_bits must lie above step_bits and be <= {MAX_STATE_BITS}, got {self.state_bits}")
        if self.values not in get_args(Values):
            raise ValueError(f"values must be one of {get_args(Values)}, got {self.values!r}")

    @property
    def rate(self) -> float:
        """Bits a weight."""
        return self.step_bits / self.step_weights

    def num_steps(self, length: int) -> int:
        """Steps of a sequence of `length` weights. Raises ValueError for no whole number, or one with less than L bits in all."""
        steps, rest = divmod(length, self.step_weights)
        if rest or steps * self.step_bits < self.state_bits:
            least = -(-self.state_bits // self.step_bits) * self.step_weights
            raise ValueError(f"a sequence needs a multiple of {self.step_weights} weights, {least} at least, not {length}")
        return steps

    def num_bytes(self, length: int) -> int:
        """Stored size of a sequence: exactly `rate * length` bits, the last byte filled up."""
        return -(-self.num_steps(length) * self.step_bits // 8)


def trellis_code(rate: float, state_bits: int, values: Values = "hybrid") -> TrellisCode:
    """The code of one of the rates of `STEPS`. Raises ValueError for any other."""
    if rate not in STEPS:
        raise ValueError(f"a trellis has {', '.join(map(str, STEPS))} bits a weight, not {rate}")
    step_bits, step_weights = STEPS[rate]
    return TrellisCode(state_bits=state_bits, step_bits=step_bits, step_weights=step_weights, values=values)
