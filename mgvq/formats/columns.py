"""Vector codes along the output channels, where each run of `d` rows of a column is an index into a table of centroids."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.formats.base import Stored
from mgvq.formats.fit import rows_and_columns
from mgvq.formats.vector import VectorWeight, centroids_by_one_thread, index_width
from mgvq.kernels.gather import multiply_columns


@dataclass(frozen=True)
class ColumnWeight(Stored):
    """A weight that is stored as the vectors of its columns; the last vector of a column is padded where `d` does not divide."""

    transposed: VectorWeight
    """The transposed weight."""

    format: ClassVar[str] = "columns"

    @property
    def shape(self) -> tuple[int, int]:
        num_in, num_out = self.transposed.shape
        return num_out, num_in

    @property
    def tunable(self) -> Mapping[str, Tensor]:
        return self.transposed.tunable

    @property
    def is_linear(self) -> bool:
        return self.transposed.is_linear

    def decoder(self) -> Callable[[Mapping[str, Tensor]], Float[Tensor, "out in"]]:
        transposed = self.transposed.decoder()
        return lambda tensors: transposed(tensors).T.contiguous()

    def tensors(self) -> Mapping[str, Tensor]:
        return self.transposed.tensors()

    def num_weights(self) -> Mapping[str, int]:
        return self.transposed.num_weights()

    def settings(self) -> Mapping[str, Any]:
        return {**self.transposed.settings(), "shape": list(self.shape)}

    @classmethod
    def check(cls, tensors: Mapping[str, Tensor], shape: list[int], stages: int) -> None:
        """Raises ValueError as `VectorWeight.check` does."""
        num_out, num_in = rows_and_columns(shape)
        VectorWeight.check(tensors, [num_in, num_out], stages)

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], shape: list[int], stages: int) -> "ColumnWeight":
        return cls(VectorWeight.load(tensors, shape[::-1], stages))

    @staticmethod
    def multiply(
        inputs: Float[Tensor, "m in"], tensors: Mapping[str, Tensor], shape: list[int], stages: int
    ) -> Float[Tensor, "m out"]:
        """`inputs W^T` of the stored weight, float32 on the CPU, without decoding it (`mgvq.kernels.gather`)."""
        tables, scale = centroids_by_one_thread(tensors["table"], tensors.get("step")), tensors.get("scale", torch.ones(()))
        width = index_width(tables.shape[1])
        return multiply_columns(inputs, tensors["codes"], width, tables, stages, shape[0]) * scale.float()
