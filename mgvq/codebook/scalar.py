"""Round to nearest (RTN) on a uniform grid per output channel or per group of input channels; no data needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mgvq.errors import UserError
from mgvq.formats.scalar import ScalarWeight, min_max
from mgvq.types import Quantized, Rate, Site, StatsBank


@dataclass(frozen=True, kw_only=True)
class Scalar:
    """Asymmetric min-max grid. `group_size` input channels share a scale and a zero point; null: the whole row does."""

    group_size: int | None

    def __post_init__(self) -> None:
        if self.group_size is not None and not (isinstance(self.group_size, int) and self.group_size >= 1):
            raise UserError(f"codebook.group_size must be a whole number >= 1 or null, got {self.group_size!r}")

    def rates(self) -> Sequence[Rate]:
        return [Rate(f"int{bits}", bits, float(bits)) for bits in range(1, 9)]

    def storage_bits(self, sites: Sequence[Site], rate: Rate) -> int:
        return sum(
            ScalarWeight.storage_bits((s.out_features, s.in_features), rate.size, self._group(s.in_features)) for s in sites
        )

    def quantize(self, weights: Mapping[Site, Tensor], rate: Rate, bank: StatsBank | None) -> Quantized:
        del bank  # the grid follows from the weights
        return Quantized({s: min_max(w, rate.size, self._group(w.shape[1])) for s, w in weights.items()})

    def _group(self, num_in: int) -> int:
        return min(num_in, self.group_size or num_in)
