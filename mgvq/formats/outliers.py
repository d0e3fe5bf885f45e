"""Weights of which a few are stored exactly, beside any other format: `W = S + R`, S sparse in the layer's own basis."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mgvq.formats.base import Stored
from mgvq.formats.exponent import MOST
from mgvq.formats.fit import check_inner, check_packed, check_tensor, check_whole, rows_and_columns
from mgvq.formats.packing import pack, packed_bytes, unpack
from mgvq.formats.rotated import INNER_FORMATS, RotatedWeight
from mgvq.formats.vector import index_width
from mgvq.kernels.linear import multiply_by
from mgvq.kernels.sparse import multiply_sparse

REST_FORMATS = {**INNER_FORMATS, RotatedWeight.format: RotatedWeight}
_ROLES = ("outlier_positions", "outlier_values")


@dataclass(frozen=True)
class Outliers:
    """The sparse part S of a layer, as it is stored: at most 16 + log2(weights of the layer) bits each, and 7 of padding."""

    positions: UInt8[Tensor, "bytes"]
    """`row * in + column` of each outlier, ascending, packed."""
    values: Float[Tensor, "n"]
    """In fp16, divided by 2^exponent."""
    exponent: int
    """0 but for layers far outside of the range of fp16."""
    shape: tuple[int, int]
    """Of the layer."""

    @classmethod
    def of(cls, positions: Int[Tensor, "n"], values: Float[Tensor, "n"], exponent: int, shape: tuple[int, int]) -> "Outliers":
        """Outliers at ascending `positions`; what fp16 cannot hold of the values is left to the rest."""
        largest = torch.finfo(torch.float16).max
        stored = (values.float() * 2.0**-exponent).clamp(-largest, largest).half()
        return cls(pack(positions, _width(shape)), stored, exponent, shape)

    def dense(self) -> Float[Tensor, "out in"]:
        """S, float32."""
        return self.decoder()(self.values)

    def decoder(self) -> Callable[[Float[Tensor, "n"]], Float[Tensor, "out in"]]:
        """`dense` as a function of the values."""
        flat = torch.zeros(self.shape[0] * self.shape[1], device=self.values.device)
        positions = unpack(self.positions, _width(self.shape), len(self.values)).long()
        return lambda values: flat.scatter(0, positions, values.float() * 2.0**self.exponent).view(self.shape)

    def tensors(self) -> Mapping[str, Tensor]:
        return dict(zip(_ROLES, (self.positions, self.values), strict=True))

    @staticmethod
    def storage_bits(shape: tuple[int, int], number: int) -> int:
        """The exact size of `tensors` in bits."""
        return 8 * packed_bytes(number, _width(shape)) + 16 * number


@dataclass(frozen=True)
class OutlierWeight(Stored):
    """A stored weight of any other format, to which the outliers are added."""

    rest: Any
    """The weight of one of `REST_FORMATS` that stands for the layer without its outliers."""
    outliers: Outliers
    """What is added to it."""

    format: ClassVar[str] = "outliers"

    @property
    def shape(self) -> tuple[int, int]:
        return self.outliers.shape

    @property
    def tunable(self) -> Mapping[str, Tensor]:
        return {**self.rest.tunable, _ROLES[1]: self.outliers.values}

    @property
    def is_linear(self) -> bool:
        return self.rest.is_linear

    def decoder(self) -> Callable[[Mapping[str, Tensor]], Float[Tensor, "out in"]]:
        rest, sparse = self.rest.decoder(), self.outliers.decoder()
        return lambda tensors: rest(tensors) + sparse(tensors[_ROLES[1]])

    def tensors(self) -> Mapping[str, Tensor]:
        return {**self.rest.tensors(), **self.outliers.tensors()}

    def num_weights(self) -> Mapping[str, int]:
        """Those of the rest, which has a code for every weight, outliers included."""
        return self.rest.num_weights()

    def settings(self) -> Mapping[str, Any]:
        rest = {"format": self.rest.format, **self.rest.settings()}
        return {"shape": list(self.shape), "exponent": self.outliers.exponent, "rest": rest}

    @classmethod
    def check(cls, tensors: Mapping[str, Tensor], shape: list[int], exponent: int, rest: Mapping[str, Any]) -> None:
        """Raises ValueError where the tensors are not those of a weight with these settings, or positions do not rise."""
        num_out, num_in = rows_and_columns(shape)
        check_whole(-MOST, MOST, exponent=exponent)
        if missing := sorted(set(_ROLES) - set(tensors)):
            raise ValueError(f"{', '.join(missing)} missing")
        positions, values = (tensors[role] for role in _ROLES)
        width = _width((num_out, num_in))
        check_tensor(tensors, "outlier_values", torch.float16, (values.numel(),))
        check_packed(tensors, "outlier_positions", len(values), width, num_out * num_in)
        if not positions.is_meta and len(values) and not bool((unpack(positions, width, len(values)).diff() > 0).all()):
            raise ValueError("outlier_positions do not rise")
        own = {role: tensor for role, tensor in tensors.items() if role not in _ROLES}
        check_inner(REST_FORMATS, own, rest, (num_out, num_in))

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], shape: list[int], exponent: int, rest: Mapping[str, Any]) -> "OutlierWeight":
        positions, values = (tensors[role] for role in _ROLES)
        own = {role: tensor for role, tensor in tensors.items() if role not in _ROLES}
        settings = {key: value for key, value in rest.items() if key != "format"}
        loaded = REST_FORMATS[rest["format"]].load(own, **settings)
        return cls(loaded, Outliers(positions, values, exponent, (shape[0], shape[1])))

    @staticmethod
    def multiply(
        inputs: Float[Tensor, "m in"], tensors: Mapping[str, Tensor], shape: list[int], exponent: int, rest: Mapping[str, Any]
    ) -> Float[Tensor, "m out"]:
        """`inputs W^T` of the stored weight, float32 on the CPU, without decoding it: the rest's and the outliers' own."""
        positions, values = (tensors[role] for role in _ROLES)
        exact = multiply_sparse(inputs, positions, _width((shape[0], shape[1])), values, shape[0]) * 2.0**exponent
        return multiply_by(REST_FORMATS[rest["format"]], inputs, tensors, rest) + exact


def _width(shape: tuple[int, int]) -> int:
    return index_width(shape[0] * shape[1])
