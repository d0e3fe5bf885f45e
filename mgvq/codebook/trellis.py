"""Trellis-coded quantisation: nearly the best code of a Gaussian, with nothing to store but its bits and a scale."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.codebook.gaussian import gaussian_scales
from mgvq.distortion import measured
from mgvq.errors import UserError
from mgvq.formats.trellis import TILE, TrellisWeight, to_tiles
from mgvq.trellis.code import MAX_STATE_BITS, STEPS, TrellisCode, Values, trellis_code
from mgvq.trellis.coding import decode, encode
from mgvq.types import ChannelSlice, Rate


@dataclass(frozen=True, kw_only=True)
class FittedTrellis:
    """The scale of one channel slice. A vector is 16 columns, coded together with 16 rows of it."""

    code: TrellisCode
    scale: Float[Tensor, ""]  # fp16
    num_out: int
    num_in: int

    vector_length: ClassVar[int] = TILE
    rows_together: ClassVar[int] = TILE

    def encode(
        self, targets: Float[Tensor, "out v 16"], first: int, root: Float[Tensor, "16 16"] | None
    ) -> tuple[Int[Tensor, "tiles v bytes"], Float[Tensor, "out v 16"]]:
        """See `FittedCodebook`: nearest by the plain distance, whatever the root. The codes are the bytes of the tiles."""
        tiles = to_tiles(targets / self.scale.float())
        codes = encode(tiles.flatten(0, 1), self.code)
        values = decode(codes, self.code, TILE * TILE).unflatten(0, tiles.shape[:2])
        rows = values.unflatten(2, (TILE, TILE)).transpose(1, 2).flatten(0, 1)
        return codes.unflatten(0, tiles.shape[:2]).int(), rows[: len(targets)] * self.scale.float()

    def rows(self, part: slice) -> "FittedTrellis":
        """Raises UserError for a run of rows that begins or ends within a tile."""
        start, stop, _ = part.indices(self.num_out)
        if start % TILE or (stop % TILE and stop < self.num_out):
            raise UserError(
                f"codebook=trellis codes {TILE} rows together, and rows {start} to {stop} of a layer have a metric of their own: "
                "choose another curvature than guided, or another codebook."
            )
        return FittedTrellis(code=self.code, scale=self.scale, num_out=stop - start, num_in=self.num_in)

    def weight(self, codes: Int[Tensor, "tiles v bytes"]) -> TrellisWeight:
        return TrellisWeight(codes.to(torch.uint8), self.code, self.scale, self.num_out, self.num_in)


@dataclass(frozen=True, kw_only=True)
class Trellis:
    """Tail-biting bit-shift trellis codes of 256 weights (QTIP, Tseng et al. 2024), at .5, 1, 1.5, 2, 3 and 4 bits a weight.

    They are made for Gaussian weights, which a rotation (`transform=hadamard`) makes of others. The scale is the root mean
    square of the slice times the factor that serves a Gaussian best (measured, `experiments/distortion`).
    """

    state_bits: int
    """L: a code has 2^L states, and a weight's values depend on L bits of the sequence."""
    values: Values
    """How a state's number gives its values: `hybrid`, by a small table of Gaussian quantiles; `computed`, in closed form."""
    spans_rows: ClassVar[bool] = True
    can_be_refitted: ClassVar[bool] = False
    needs_importance: ClassVar[bool] = False
    needs_gram: ClassVar[bool] = False
    follows_metric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (type(self.state_bits) is int and 5 <= self.state_bits <= MAX_STATE_BITS):
            raise UserError(f"codebook.state_bits must be a whole number of 5 to {MAX_STATE_BITS}, got {self.state_bits!r}")
        if self.values not in ("computed", "hybrid"):
            raise UserError(f"codebook.values must be computed or hybrid, got {self.values!r}")
        for rate in self.rates():
            self._measured(rate)

    def rates(self) -> Sequence[Rate]:
        return [Rate(f"L{self.state_bits}x{bits:g}", bits) for bits in STEPS]

    def table_group(self, channel_slice: ChannelSlice) -> str:
        return f"{channel_slice.site.name}/{channel_slice.group}"

    def storage_bits(self, slices: Sequence[ChannelSlice], rate: Rate) -> int:
        return sum(TrellisWeight.storage_bits(s.shape, self._code(rate)) for s in slices)

    def fit(
        self,
        name: str,
        weights: Sequence[Float[Tensor, "_ _"]],
        rate: Rate,
        importance: Sequence[Tensor | None],
        flags: list[str],
    ) -> Sequence[FittedTrellis]:
        """Raises ValueError for weights that are not finite."""
        return [self._fit(weight, rate) for weight in weights]

    def distortion(self, rate: Rate) -> float:
        """The mean squared error of a Gaussian of variance 1, as measured."""
        return self._measured(rate).distortion

    def _measured(self, rate: Rate):
        try:
            return measured(f"trellis_{self.values}_{self.state_bits}", rate.index_bits)
        except KeyError:
            raise UserError(
                f"codebook.state_bits must be 8, 10, 12 or 14, got {self.state_bits}: what others leave of a Gaussian has not "
                f"been measured with values={self.values}; experiments/distortion/measure.py adds one."
            ) from None

    def _code(self, rate: Rate) -> TrellisCode:
        return trellis_code(rate.index_bits, self.state_bits, self.values)

    def _fit(self, weight: Float[Tensor, "out c"], rate: Rate) -> FittedTrellis:
        scale = gaussian_scales(weight, self._measured(rate).scales)[0]
        return FittedTrellis(code=self._code(rate), scale=scale, num_out=weight.shape[0], num_in=weight.shape[1])
