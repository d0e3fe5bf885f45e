"""Lattice codes: runs of eight input channels of a row, a point of a lattice at each stage; no table is stored."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.formats.base import Stored
from mgvq.formats.fit import check_roles, check_tensor, check_whole, rows_and_columns
from mgvq.kernels.lattice import multiply_points
from mgvq.lattice.coding import STAGES, points
from mgvq.lattice.points import DIMENSION


@dataclass(frozen=True)
class LatticeWeight(Stored):
    """The codes of every vector, and a scale for each stage. A row's last vector may be filled up; it is stored and counted."""

    codes: Int[Tensor, "out vectors stages"]
    """The numbers of the points, of 8 or 16 bits each (`mgvq.lattice.coding.STAGES`)."""
    scales: Float[Tensor, "stages"]
    """What the points of each stage are multiplied by, in fp16."""
    bits: int
    """Bits a weight: 2, 3 or 4."""
    num_in: int
    """Input channels of the weight."""

    format: ClassVar[str] = "lattice"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.num_in

    @property
    def tunable(self) -> Mapping[str, Tensor]:
        return {"scales": self.scales}

    @property
    def is_linear(self) -> bool:
        return True

    def decoder(self) -> Callable[[Mapping[str, Tensor]], Float[Tensor, "out in"]]:
        stages = points(self.codes.flatten(0, 1), self.bits)

        def weight(tensors: Mapping[str, Tensor]) -> Float[Tensor, "out in"]:
            scales = tensors["scales"].float()
            total = torch.zeros((), device=scales.device)
            for stage, scale in zip(stages, scales.unbind(), strict=True):
                total = total + stage * scale
            return total.view(len(self.codes), -1)[:, : self.num_in]

        return weight

    def tensors(self) -> Mapping[str, Tensor]:
        """The codes of a vector are as many bytes as a weight has bits: each stage's own, the lowest first."""
        stages = zip(self.codes.unbind(2), STAGES[self.bits], strict=True)
        parts = [codes >> shift & 255 for codes, width in stages for shift in range(0, width, 8)]
        return {"codes": torch.stack(parts, 2).to(torch.uint8), "scales": self.scales}

    def num_weights(self) -> Mapping[str, int]:
        return {"codes": math.prod(self.shape)}

    def settings(self) -> Mapping[str, Any]:
        return {"shape": list(self.shape), "bits": self.bits}

    @classmethod
    def check(cls, tensors: Mapping[str, Tensor], shape: list[int], bits: int) -> None:
        """Raises ValueError where the tensors are not those of a weight with these settings, or its scales no numbers > 0."""
        num_out, num_in = rows_and_columns(shape)
        check_whole(min(STAGES), max(STAGES), bits=bits)
        check_roles(tensors, ("codes", "scales"))
        check_tensor(tensors, "codes", torch.uint8, (num_out, -(-num_in // DIMENSION), bits))
        check_tensor(tensors, "scales", torch.float16, (len(STAGES[bits]),))
        if not tensors["scales"].is_meta and not bool((tensors["scales"] > 0).all()):
            raise ValueError(f"scales are {tensors['scales'].tolist()} instead of numbers > 0")

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], shape: list[int], bits: int) -> "LatticeWeight":
        stages, at = [], 0
        for width in STAGES[bits]:
            parts = tensors["codes"][:, :, at : at + width // 8].int()
            stages.append((parts << torch.arange(0, width, 8, device=parts.device)).sum(2, dtype=torch.int32))
            at += width // 8
        return cls(torch.stack(stages, 2), tensors["scales"], bits, shape[1])

    @staticmethod
    def multiply(
        inputs: Float[Tensor, "m in"], tensors: Mapping[str, Tensor], shape: list[int], bits: int
    ) -> Float[Tensor, "m out"]:
        """`inputs W^T` of the stored weight, float32 on the CPU, without decoding it (`mgvq.kernels.lattice`)."""
        return multiply_points(inputs, tensors["codes"], bits, tensors["scales"])

    @staticmethod
    def storage_bits(shape: tuple[int, int], bits: int) -> int:
        """The exact size of `tensors` in bits."""
        return shape[0] * -(-shape[1] // DIMENSION) * DIMENSION * bits + 16 * len(STAGES[bits])
