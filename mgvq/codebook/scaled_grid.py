"""AWQ's codebook: a grid for weights whose input channels are stretched first, the more the larger their activations are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.codebook.grid import FittedGrid, Grid
from mgvq.codebook.sharing import table_group
from mgvq.errors import UserError
from mgvq.formats.grid import CHANNEL_BITS, channel_bits, pack_channels, stretch
from mgvq.types import ChannelSlice, Rate


@dataclass(frozen=True, kw_only=True)
class ScaledGrid(Grid):
    """Column c is rounded as `s_c W_c` and divided by s_c again, `s_c = (mean square activation of c)^(a / 2)` (Lin et al. 2024).

    The exponent a in [0, 1) is the one with the least output error `tr(D H D^T)` of round to nearest, H the input factor of the
    metric. Layers that read the same activations share it, and their errors add up. s_c is rounded to a power of sqrt(2) and
    reaches from the channel of the largest activations down by a factor of 11 at most, so that it takes 3 bits a channel, which
    are stored and counted (AWQ folds s into the norm or the layer before instead).
    """

    num_exponents: int
    """How many exponents are tried, 2 or more: 0, 1/n, 2/n, ..."""

    needs_gram: ClassVar[bool] = True

    @property
    def needs_importance(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.num_exponents, int) and self.num_exponents >= 2):
            raise UserError(
                f"codebook.num_exponents must be a whole number >= 2, got {self.num_exponents!r}; for 1: codebook=grid"
            )

    def table_group(self, channel_slice: ChannelSlice) -> str:
        """Layers that read the same activations share their stretch, which is stored once."""
        return table_group(channel_slice, "input")

    def storage_bits(self, slices: Sequence[ChannelSlice], rate: Rate) -> int:
        return super().storage_bits(slices, rate) + channel_bits(slices[0].shape[1])

    def fit(
        self,
        name: str,
        weights: Sequence[Float[Tensor, "_ _"]],
        rate: Rate,
        importance: Sequence[Tensor | None],
        flags: list[str],
    ) -> Sequence[FittedGrid]:
        """Fit the grids of a table group. Flag: `no_activation:<table group>`, whose channels are left alone.

        Raises UserError where there is no Gram.
        """
        grams = [gram.to(w.device) for w, gram in zip(weights, importance, strict=True) if gram is not None]
        if len(grams) < len(weights):
            raise UserError(
                "codebook=scaled_grid looks at activations, but there are no statistics: choose a curvature and a calibration set"
            )
        power = torch.stack([gram.diagonal() for gram in grams]).mean(0).clamp(min=0)
        if not power.max() > 0:
            flags.append(f"no_activation:{name}")
            return self._fit_all(weights, int(rate.index_bits), torch.zeros_like(power).int())
        least, best = float("inf"), None
        for step in range(self.num_exponents):
            fitted = self._fit_all(weights, int(rate.index_bits), _channel_codes(power, step / self.num_exponents))
            error = sum(_output_error(w.float(), f, gram) for w, f, gram in zip(weights, fitted, grams, strict=True))
            if error < least:
                least, best = error, fitted
        assert best is not None, "the errors are finite"
        return best

    def _fit_all(self, weights: Sequence[Float[Tensor, "_ _"]], bits: int, codes: Int[Tensor, "c"]) -> list[FittedGrid]:
        channels = pack_channels(codes)  # one object: stored once
        return [self._fit(w.float() * stretch(codes), bits, channels) for w in weights]


def _channel_codes(power: Float[Tensor, "c"], exponent: float) -> Int[Tensor, "c"]:
    """Return the steps of sqrt(2) of `power^(exponent / 2)` above the smallest, or above 1/11 of the largest."""
    down = (exponent * (power.max() / power.clamp(min=1e-30)).log2()).round().clamp(max=2**CHANNEL_BITS - 1)
    return (down.max() - down).int()


def _output_error(weight: Float[Tensor, "out c"], fitted: FittedGrid, gram: Float[Tensor, "c c"]) -> float:
    """`tr(D H D^T)` for the error D of round to nearest."""
    error = (fitted.encode(weight[:, :, None], 0, None)[1][:, :, 0] - weight).double()
    return float(((error @ gram.double()) * error).sum())
