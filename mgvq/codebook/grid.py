"""Symmetric uniform grids whose scales take few bits: the codebook of scalar methods where every byte counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mgvq.codebook.sharing import table_group
from mgvq.errors import UserError
from mgvq.formats.grid import CHANNEL_BITS, GridWeight, middle, scale_levels, stretch
from mgvq.formats.packing import narrowest, unpack
from mgvq.types import ChannelSlice, Rate

_TRIES = tuple(2 ** (-i / 4) for i in range(12))  # shares of the scale that spans all weights of a group
_RANGE = 16.0  # the largest scale of a layer over the smallest, at most
_SMALLEST = 2.0**-24  # the smallest fp16 number above 0
_HALF_MAX = 65000.0  # just below the largest fp16 number


@dataclass(frozen=True, kw_only=True)
class FittedGrid:
    """The grids of one channel slice, as `GridWeight` stores them."""

    scale_codes: Int[Tensor, "out groups"]
    """Which of the slice's scales each group takes."""
    span: Float[Tensor, "2"]
    """The smallest and the largest scale of the slice, in fp16."""
    bits: int
    """Bits of a code."""
    scale_bits: int
    """Bits of a scale code."""
    group_size: int
    """Columns that share a scale."""
    num_in: int
    """Columns of the slice."""
    channels: UInt8[Tensor, "bytes"] | None = None
    """What each column is multiplied by before it is rounded, packed (`formats.grid.pack_channels`); None: 1."""

    vector_length: ClassVar[int] = 1

    @cached_property
    def _scales(self) -> Float[Tensor, "out groups"]:
        return scale_levels(self.span, self.scale_bits)[self.scale_codes.long()]

    @cached_property
    def _stretch(self) -> Float[Tensor, "c"]:
        if self.channels is None:
            return torch.ones(self.num_in, device=self.span.device)
        return stretch(unpack(self.channels, CHANNEL_BITS, self.num_in))

    def encode(
        self, targets: Float[Tensor, "out v 1"], first: int, root: Float[Tensor, "1 1"] | None
    ) -> tuple[Int[Tensor, "out v 1"], Float[Tensor, "out v 1"]]:
        """See `FittedCodebook`; in one dimension every root gives the same code."""
        columns = torch.arange(first, first + targets.shape[1], device=targets.device)
        scales, factors = self._scales[:, columns // self.group_size], self._stretch[columns]
        codes = _codes(targets[:, :, 0] * factors, scales, self.bits)
        return codes.int()[:, :, None], (scales * (codes - middle(self.bits)) / factors)[:, :, None]

    def rows(self, part: slice) -> "FittedGrid":
        sizes = {"bits": self.bits, "scale_bits": self.scale_bits, "group_size": self.group_size, "num_in": self.num_in}
        return FittedGrid(scale_codes=self.scale_codes[part], span=self.span, channels=self.channels, **sizes)

    def weight(self, codes: Int[Tensor, "out v 1"]) -> GridWeight:
        sizes = self.bits, self.scale_bits, self.group_size
        return GridWeight(narrowest(codes[:, :, 0], self.bits), self.scale_codes, self.span, *sizes, channels=self.channels)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A symmetric grid without a zero point: at two bits its levels are `scale * (-1.5, -.5, .5, 1.5)`.

    The scale of a group is the one of the slice's scales with the least squared error of round to nearest. The scales of a slice
    rise geometrically from the smallest to the largest that its groups would choose for themselves. A group of zeros has no level
    at 0 and takes the smallest scale.
    """

    group_size: int | None
    """Input channels of a row that share a scale; None: the whole row of a channel slice does."""
    scale_bits: int
    """Bits of a scale: a channel slice has 2^scale_bits scales."""

    weighted: bool = False
    """Whether the squared error of a channel counts with its importance in the choice of scales."""

    needs_gram: ClassVar[bool] = False
    follows_metric: ClassVar[bool] = True
    spans_rows: ClassVar[bool] = False
    can_be_refitted: ClassVar[bool] = False

    @property
    def needs_importance(self) -> bool:
        return self.weighted

    def __post_init__(self) -> None:
        if self.group_size is not None and not (isinstance(self.group_size, int) and self.group_size >= 1):
            raise UserError(f"codebook.group_size must be a whole number >= 1 or null, got {self.group_size!r}")
        if not (isinstance(self.scale_bits, int) and 1 <= self.scale_bits <= 8):
            raise UserError(f"codebook.scale_bits must be a whole number of 1 to 8, got {self.scale_bits!r}")

    def rates(self) -> Sequence[Rate]:
        return [Rate(f"int{bits}", float(bits)) for bits in range(1, 9)]

    def distortion(self, rate: Rate) -> float:
        """`2^(-2 bits)`, the distortion-rate function of a Gaussian."""
        return 4.0**-rate.index_bits

    def table_group(self, channel_slice: ChannelSlice) -> str:
        """Every channel slice has grids of its own."""
        return table_group(channel_slice, "layer")

    def storage_bits(self, slices: Sequence[ChannelSlice], rate: Rate) -> int:
        bits = int(rate.index_bits)
        return sum(GridWeight.storage_bits(s.shape, bits, self.scale_bits, self._size(s.shape[1])) for s in slices)

    def fit(
        self,
        name: str,
        weights: Sequence[Float[Tensor, "_ _"]],
        rate: Rate,
        importance: Sequence[Tensor | None],
        flags: list[str],
    ) -> Sequence[FittedGrid]:
        """Raises ValueError for weights that are not finite or too large for fp16 scales."""
        bits = int(rate.index_bits)
        counts = importance if self.weighted else [None] * len(weights)
        return [self._fit(w.float(), bits, counts=c) for w, c in zip(weights, counts, strict=True)]

    def _size(self, num_in: int) -> int:
        return min(num_in, self.group_size or num_in)

    def _fit(
        self,
        weight: Float[Tensor, "out c"],
        bits: int,
        channels: UInt8[Tensor, "bytes"] | None = None,
        counts: Float[Tensor, "c"] | None = None,
    ) -> FittedGrid:
        """Fit the grids of one slice, whose weight is stretched as `channels` says and whose channels count as `counts` say.

        Channels of which none counts count all alike.
        """
        num_in = weight.shape[1]
        size = self._size(num_in)
        grouped = torch.nn.functional.pad(weight, (0, -num_in % size), value=torch.nan).unflatten(1, (-1, size))
        per_channel = None
        if counts is not None and counts.max() > 0:
            per_channel = torch.nn.functional.pad(counts.to(weight.device).double(), (0, -num_in % size)).view(-1, size)
        largest = weight.abs().amax()
        if not largest < _HALF_MAX:
            raise ValueError(f"weights must be finite and below {_HALF_MAX:g}, got {float(largest):g}")
        whole = grouped.abs().nan_to_num(0).amax(2) / middle(bits)  # the scale whose outer levels are the largest weights
        own = whole * torch.tensor(_TRIES, device=weight.device)[_best(grouped, per_channel, [whole * t for t in _TRIES], bits)]
        used = own[whole > 0] if (whole > 0).any() else whole
        high = used.max().clamp(_SMALLEST, _HALF_MAX)
        span = torch.stack([torch.maximum(used.min(), high / _RANGE).clamp(min=_SMALLEST), high]).half()
        levels = scale_levels(span, self.scale_bits)
        scale_codes = _best(grouped, per_channel, [level.expand_as(whole) for level in levels], bits).int()
        sizes = {"bits": bits, "scale_bits": self.scale_bits, "group_size": size, "num_in": num_in}
        return FittedGrid(scale_codes=scale_codes, span=span, channels=channels, **sizes)


def _best(
    grouped: Float[Tensor, "out g c"], counts: Float[Tensor, "g c"] | None, tries: Sequence[Float[Tensor, "out g"]], bits: int
) -> Int[Tensor, "out g"]:
    """Return which scale rounds each group with the least squared error, the first of equal ones; NaN marks padding.

    With `counts` channels count with them.
    """
    errors = []
    for scales in tries:
        wide = scales.clamp(min=_SMALLEST)[..., None]
        values = wide * (_codes(grouped, wide, bits) - middle(bits))
        squares = (values - grouped).nan_to_num(0).square()
        errors.append((squares if counts is None else squares * counts).sum(2, dtype=torch.float64))
    return torch.stack(errors).argmin(0)


def _codes(values: Float[Tensor, "..."], scales: Float[Tensor, "..."], bits: int) -> Float[Tensor, "..."]:
    return (values / scales + middle(bits)).round().clamp(0, 2**bits - 1)
