"""Weights far outside the range of fp16: stored as a power of two times a weight that lies inside."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from jaxtyping import Float
from torch import Tensor

from mgvq.formats.base import Stored
from mgvq.formats.columns import ColumnWeight
from mgvq.formats.fit import check_inner, check_whole, rows_and_columns
from mgvq.formats.grid import GridWeight
from mgvq.formats.lattice import LatticeWeight
from mgvq.formats.scalar import ScalarWeight
from mgvq.formats.trellis import TrellisWeight
from mgvq.formats.vector import VectorWeight
from mgvq.kernels.linear import multiply_by

PlainWeight = ScalarWeight | GridWeight | VectorWeight | ColumnWeight | TrellisWeight | LatticeWeight
MOST = 120
PLAIN_FORMATS = {f.format: f for f in get_args(PlainWeight)}


@dataclass(frozen=True)
class ExponentWeight(Stored):
    """`2^exponent` times a weight of another format. The exponent is a setting, so that `tensors` cost what they cost without."""

    plain: PlainWeight
    """The weight whose tables and scales fp16 can hold."""
    exponent: int
    """The power of two, from -MOST to MOST."""

    format: ClassVar[str] = "exponent"

    @property
    def shape(self) -> tuple[int, int]:
        return self.plain.shape

    @property
    def tunable(self) -> Mapping[str, Tensor]:
        return self.plain.tunable

    @property
    def is_linear(self) -> bool:
        return self.plain.is_linear

    def decoder(self) -> Callable[[Mapping[str, Tensor]], Float[Tensor, "out in"]]:
        plain = self.plain.decoder()
        return lambda tensors: plain(tensors) * 2.0**self.exponent

    def tensors(self) -> Mapping[str, Tensor]:
        return self.plain.tensors()

    def num_weights(self) -> Mapping[str, int]:
        return self.plain.num_weights()

    def settings(self) -> Mapping[str, Any]:
        plain = {"format": self.plain.format, **self.plain.settings()}
        return {"shape": list(self.shape), "exponent": self.exponent, "plain": plain}

    @classmethod
    def check(cls, tensors: Mapping[str, Tensor], shape: list[int], exponent: int, plain: Mapping[str, Any]) -> None:
        """Raises ValueError where the tensors are not those of a weight with these settings."""
        check_whole(-MOST, MOST, exponent=exponent)
        check_inner(PLAIN_FORMATS, tensors, plain, rows_and_columns(shape))

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], shape: list[int], exponent: int, plain: Mapping[str, Any]) -> "ExponentWeight":
        settings = {key: value for key, value in plain.items() if key != "format"}
        return cls(PLAIN_FORMATS[plain["format"]].load(tensors, **settings), exponent)

    @staticmethod
    def multiply(
        inputs: Float[Tensor, "m in"], tensors: Mapping[str, Tensor], shape: list[int], exponent: int, plain: Mapping[str, Any]
    ) -> Float[Tensor, "m out"]:
        """`inputs W^T` of the stored weight, float32 on the CPU, without decoding it."""
        return multiply_by(PLAIN_FORMATS[plain["format"]], inputs, tensors, plain) * 2.0**exponent
