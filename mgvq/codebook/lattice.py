"""QuIP#'s lattice codes: eight weights are one of 65,536 points that lie densely where a Gaussian does; no table to store."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from mgvq.codebook.gaussian import gaussian_scales
from mgvq.distortion import measured
from mgvq.formats.lattice import LatticeWeight
from mgvq.lattice.coding import STAGES, decode, encode
from mgvq.lattice.points import DIMENSION
from mgvq.types import ChannelSlice, Rate


@dataclass(frozen=True, kw_only=True)
class FittedLattice:
    """The scales of one channel slice."""

    scales: Float[Tensor, "stages"]
    """What the points of each stage are multiplied by, in fp16."""
    bits: int
    """Bits a weight: 2, 3 or 4."""
    num_in: int
    """Columns of the slice."""

    vector_length: ClassVar[int] = DIMENSION

    def encode(
        self, targets: Float[Tensor, "out v 8"], first: int, root: Float[Tensor, "8 8"] | None
    ) -> tuple[Int[Tensor, "out v stages"], Float[Tensor, "out v 8"]]:
        """See `FittedCodebook`: nearest by the plain distance, whatever the root."""
        scales = self.scales.tolist()
        codes = encode(targets.flatten(0, 1), self.bits, scales)
        return codes.view(*targets.shape[:2], -1), decode(codes, self.bits, scales).view(targets.shape)

    def rows(self, part: slice) -> "FittedLattice":
        return self

    def weight(self, codes: Int[Tensor, "out v stages"]) -> LatticeWeight:
        return LatticeWeight(codes, self.scales, self.bits, self.num_in)


@dataclass(frozen=True, kw_only=True)
class Lattice:
    """E8P at 2 bits a weight, and with a second stage for what that leaves at 3 and 4 (Tseng et al. 2024).

    Made for Gaussian weights, which a rotation (`transform=hadamard`) makes of others. The scales are the root mean square of the
    slice times the factors that serve a Gaussian best (measured, `experiments/distortion`).
    """

    spans_rows: ClassVar[bool] = False
    can_be_refitted: ClassVar[bool] = False
    needs_importance: ClassVar[bool] = False
    needs_gram: ClassVar[bool] = False
    follows_metric: ClassVar[bool] = False

    def rates(self) -> Sequence[Rate]:
        return [
            Rate(f"{DIMENSION}x{'+'.join(str(2**width) for width in widths)}", float(bits)) for bits, widths in STAGES.items()
        ]

    def table_group(self, channel_slice: ChannelSlice) -> str:
        return f"{channel_slice.site.name}/{channel_slice.group}"

    def storage_bits(self, slices: Sequence[ChannelSlice], rate: Rate) -> int:
        return sum(LatticeWeight.storage_bits(s.shape, int(rate.index_bits)) for s in slices)

    def fit(
        self,
        name: str,
        weights: Sequence[Float[Tensor, "_ _"]],
        rate: Rate,
        importance: Sequence[Tensor | None],
        flags: list[str],
    ) -> Sequence[FittedLattice]:
        """Raises ValueError for weights that are not finite."""
        factors = measured("lattice", rate.index_bits).scales
        return [
            FittedLattice(scales=gaussian_scales(weight, factors), bits=int(rate.index_bits), num_in=weight.shape[1])
            for weight in weights
        ]

    def distortion(self, rate: Rate) -> float:
        """The mean squared error of a Gaussian of variance 1, as measured."""
        return measured("lattice", rate.index_bits).distortion
