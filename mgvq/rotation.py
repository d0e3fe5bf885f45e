"""Orthogonal transforms `H_n S` that make weights Gaussian, and a layer's problem under them.

`S` has random signs on its diagonal, `H_n = Sylvester(2^k) (x) C_m` with n = 2^k m, m odd, and C_m the orthonormal DCT-II: of
every size, in closed form, nothing to store but the signs (QuIP#, Tseng et al. 2024, with another odd factor). The metric
`tr(H_O D H_I D^T)` of an error D is the same before and after where all of a layer's problem is turned.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_TOGETHER = 2**18  # numbers that are turned at a time: a turn makes half a dozen copies, which then stay in the processor's cache


def random_signs(n: int, generator: torch.Generator) -> Float[Tensor, "n"]:
    """n signs, +1 or -1 alike, float32 on the CPU."""
    return 1.0 - 2.0 * torch.randint(2, (n,), generator=generator)


def rotate(x: Float[Tensor, "*b n"], signs: Float[Tensor, "n"]) -> Float[Tensor, "*b n"]:
    """`H S x` of every vector along the last dimension, in x's own precision; about n log n + m n operations a vector."""
    return _hadamard(x * signs.to(x), transposed=False)


def rotate_back(x: Float[Tensor, "*b n"], signs: Float[Tensor, "n"]) -> Float[Tensor, "*b n"]:
    """`(H S)^-1 x = S H^T x`."""
    return _hadamard(x, transposed=True) * signs.to(x)


def dct(m: int) -> Float[Tensor, "m m"]:
    """The orthonormal DCT-II, float64: row k is `sqrt(2 / m) cos(pi k (2 i + 1) / 2m)`, the first one constant."""
    k, i = torch.arange(m, dtype=torch.float64)[:, None], torch.arange(m, dtype=torch.float64)
    matrix = torch.cos(math.pi / (2 * m) * k * (2 * i + 1)) * math.sqrt(2 / m)
    matrix[0] = math.sqrt(1 / m)
    return matrix


def _hadamard(x: Float[Tensor, "*b n"], transposed: bool) -> Float[Tensor, "*b n"]:
    """`H_n x` or `H_n^T x`; its Sylvester factor is symmetric."""
    n = x.shape[-1]
    power = n & -n
    y = x.unflatten(-1, (power, n // power))
    if n > power:
        factor = dct(n // power).to(x)
        y = y @ (factor if transposed else factor.T)
    width = 1
    while width < power:  # sums and differences over one bit of the first index after the other
        first, second = y.unflatten(-2, (-1, 2, width)).unbind(-3)
        y = torch.stack([first + second, first - second], -3).flatten(-4, -2)
        width *= 2
    return y.flatten(-2) / math.sqrt(power)


@dataclass(frozen=True, slots=True)
class Rotation:
    """An orthogonal matrix Q over n channels, block by block: each of `blocks` is turned by its own `H S` within its channels.

    One block of all channels turns the layer as a whole; one a channel group leaves the groups what they are. Raises ValueError
    where blocks overlap, leave a channel out, or have not as many signs as channels.
    """

    blocks: Sequence[Int[Tensor, "_"]]
    signs: Sequence[Float[Tensor, "_"]]

    def __post_init__(self) -> None:
        channels = sorted(c for block in self.blocks for c in block.tolist())
        if channels != list(range(len(channels))):
            raise ValueError("the blocks of a rotation must be disjoint and hold every channel")
        if [len(block) for block in self.blocks] != [len(signs) for signs in self.signs]:
            raise ValueError("a rotation needs one sign for every channel of every block")

    def apply(self, x: Float[Tensor, "*b n"], into: Float[Tensor, "*b n"] | None = None) -> Float[Tensor, "*b n"]:
        """`Q x` of every vector along the last dimension, in a new tensor; or in `into`, in its dtype, which may be x itself."""
        return self._blockwise(x, rotate, into)

    def apply_back(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        """`Q^T x` of every vector along the last dimension."""
        return self._blockwise(x, rotate_back)

    def _blockwise(self, x: Tensor, turn: Callable[[Tensor, Tensor], Tensor], into: Tensor | None = None) -> Tensor:
        y = torch.empty_like(x) if into is None else into
        rows = max(1, _TOGETHER // max(1, x.shape[-1])) if x.ndim > 1 else len(x)
        for start in range(0, len(x), rows):  # one view at a time: autograd writes into none of the several that a split returns
            part, turned = x[start : start + rows].to(y.dtype), y[start : start + rows]
            for block, signs in zip(self.blocks, self.signs, strict=True):
                turned[..., block] = turn(part[..., block], signs)
        return y


def random_rotation(blocks: Sequence[Int[Tensor, "_"]], generator: torch.Generator) -> Rotation:
    """With signs drawn block after block."""
    return Rotation(blocks, [random_signs(len(block), generator) for block in blocks])


def rotate_matrix(matrix: Float[Tensor, "out in"], outputs: Rotation | None, inputs: Rotation | None) -> Float[Tensor, "out in"]:
    """`U M V^T`: a weight or its gradient under rotations U of the outputs and V of the inputs, None: the identity."""
    turned = matrix if inputs is None else inputs.apply(matrix)
    return turned if outputs is None else outputs.apply(turned.T).T


def rotate_matrix_back(
    matrix: Float[Tensor, "out in"], outputs: Rotation | None, inputs: Rotation | None
) -> Float[Tensor, "out in"]:
    """`U^T M V`, the inverse of `rotate_matrix`."""
    turned = matrix if inputs is None else inputs.apply_back(matrix)
    return turned if outputs is None else outputs.apply_back(turned.T).T


def rotate_factor(factor: Float[Tensor, "n n"], rotation: Rotation) -> Float[Tensor, "n n"]:
    """`Q H Q^T`, float64: a symmetric factor of the metric, of the inputs under V or of the outputs under U; symmetric to the
    last bit."""
    turned = rotation.apply(factor, torch.empty(factor.shape, dtype=torch.float64, device=factor.device))
    rotation.apply(turned.T, turned.T)
    return (turned + turned.T).div_(2)
