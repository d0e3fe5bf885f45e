"""Uniform grids for each output channel or each group of input channels, fitted without data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.codebook.sharing import table_group
from mgvq.errors import UserError
from mgvq.formats.packing import narrowest
from mgvq.formats.scalar import ScalarWeight
from mgvq.types import ChannelSlice, Rate

_HALF_MAX = 65000.0  # just below the largest fp16 number
_FACTORS = {"min_max": (1.0,), "mse": tuple(1 - i / 20 for i in range(16))}  # shares of the range that are tried, by `clip`


@dataclass(frozen=True, kw_only=True)
class FittedScalar:
    """The grids of one channel slice, as `ScalarWeight` stores them."""

    zeros: Int[Tensor, "out groups"]
    """The codes that stand for 0."""
    scales: Float[Tensor, "out groups"]
    """The distances of two levels, in fp16."""
    bits: int
    """Bits of a code."""
    group_size: int
    """Columns that share a scale and a zero point."""

    vector_length: ClassVar[int] = 1

    def encode(
        self, targets: Float[Tensor, "out v 1"], first: int, root: Float[Tensor, "1 1"] | None
    ) -> tuple[Int[Tensor, "out v 1"], Float[Tensor, "out v 1"]]:
        """See `FittedCodebook`; in one dimension every root gives the same code."""
        columns = torch.arange(first, first + targets.shape[1], device=targets.device) // self.group_size
        scales, zeros = self.scales[:, columns].float(), self.zeros[:, columns]
        codes = _codes(targets[:, :, 0], zeros, scales, self.bits)
        return codes.int()[:, :, None], (scales * (codes - zeros))[:, :, None]

    def rows(self, part: slice) -> "FittedScalar":
        return FittedScalar(zeros=self.zeros[part], scales=self.scales[part], bits=self.bits, group_size=self.group_size)

    def weight(self, codes: Int[Tensor, "out v 1"]) -> ScalarWeight:
        return ScalarWeight(narrowest(codes[:, :, 0], self.bits), self.zeros, self.scales, self.bits, self.group_size)


@dataclass(frozen=True, kw_only=True)
class Scalar:
    """An asymmetric grid with 2^bits levels, one of which is 0."""

    group_size: int | None
    """Input channels that share a scale and a zero point; None: the whole row of a channel slice does."""
    clip: str
    """What the grid spans. `min_max`: all weights of a group; `mse`: the share of their range, 100 % to 25 % in steps of 5 %,
    that has the least squared error of round to nearest."""

    needs_importance: ClassVar[bool] = False
    needs_gram: ClassVar[bool] = False
    follows_metric: ClassVar[bool] = True
    spans_rows: ClassVar[bool] = False
    can_be_refitted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.group_size is not None and not (isinstance(self.group_size, int) and self.group_size >= 1):
            raise UserError(f"codebook.group_size must be a whole number >= 1 or null, got {self.group_size!r}")
        if self.clip not in _FACTORS:
            raise UserError(f"codebook.clip must be min_max or mse, got {self.clip!r}")

    def rates(self) -> Sequence[Rate]:
        return [Rate(f"int{bits}", float(bits)) for bits in range(1, 9)]

    def distortion(self, rate: Rate) -> float:
        """`2^(-2 bits)`, the distortion-rate function of a Gaussian."""
        return 4.0**-rate.index_bits

    def table_group(self, channel_slice: ChannelSlice) -> str:
        """Every channel slice has grids of its own."""
        return table_group(channel_slice, "layer")

    def storage_bits(self, slices: Sequence[ChannelSlice], rate: Rate) -> int:
        return sum(ScalarWeight.storage_bits(s.shape, int(rate.index_bits), self._size(s.shape[1])) for s in slices)

    def fit(
        self,
        name: str,
        weights: Sequence[Float[Tensor, "_ _"]],
        rate: Rate,
        importance: Sequence[Float[Tensor, "_"] | None],
        flags: list[str],
    ) -> Sequence[FittedScalar]:
        """Raises ValueError for weights that are not finite or too large for fp16 scales."""
        return [_fit(w.float(), int(rate.index_bits), self._size(w.shape[1]), _FACTORS[self.clip]) for w in weights]

    def _size(self, num_in: int) -> int:
        return min(num_in, self.group_size or num_in)


def _fit(weight: Float[Tensor, "out c"], bits: int, group_size: int, factors: Sequence[float]) -> FittedScalar:
    grouped = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group_size)).unflatten(1, (-1, group_size))
    top = 2**bits - 1
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    if not (high - low).max() < _HALF_MAX * top:
        raise ValueError(f"weights must be finite and span less than {_HALF_MAX * top:g}, got [{low.min()}, {high.max()}]")
    scales, zeros = _grid(low, high, bits)
    if len(factors) > 1:
        least = torch.full_like(low, torch.inf, dtype=torch.float64)
        for factor in factors:
            tried = _grid(low * factor, high * factor, bits)
            wide, shift = tried[0].float()[..., None], tried[1][..., None]
            error = (wide * (_codes(grouped, shift, wide, bits) - shift) - grouped).square().sum(2, dtype=torch.float64)
            better = error < least
            scales, zeros = torch.where(better, tried[0], scales), torch.where(better, tried[1], zeros)
            least = torch.where(better, error, least)
    return FittedScalar(zeros=zeros.int(), scales=scales, bits=bits, group_size=group_size)


def _grid(low: Float[Tensor, "out g"], high: Float[Tensor, "out g"], bits: int) -> tuple[Tensor, Tensor]:
    """Return fp16 scales and zero points. Scales are rounded before anything is chosen by them, and up."""
    top = 2**bits - 1
    scales = _half_up(((high - low) / top).clamp(min=2.0**-24))
    return scales, (-low / scales.float()).round().clamp(0, top)


def _codes(values: Float[Tensor, "..."], zeros: Tensor, scales: Float[Tensor, "..."], bits: int) -> Float[Tensor, "..."]:
    return (values / scales + zeros).round().clamp(0, 2**bits - 1)


def _half_up(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The smallest fp16 numbers that are not below the values."""
    half = values.half()
    return torch.where(half.float() < values, torch.nextafter(half, torch.full_like(half, torch.inf)), half)
