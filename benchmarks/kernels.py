"""What products with a packed 4096 x 4096 layer cost on two threads: of a token against torch's, of `FEW` against decoding."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from mgvq.checkpoint.linear import PackedLinear
from mgvq.formats.columns import ColumnWeight
from mgvq.formats.grid import GridWeight
from mgvq.formats.grouped import GroupedWeight, pack_groups
from mgvq.formats.lattice import LatticeWeight
from mgvq.formats.outliers import Outliers, OutlierWeight
from mgvq.formats.packing import pack
from mgvq.formats.rotated import RotatedWeight
from mgvq.formats.scalar import ScalarWeight
from mgvq.formats.trellis import TrellisWeight
from mgvq.formats.vector import VectorWeight
from mgvq.kernels.linear import FEW
from mgvq.rng import generator
from mgvq.trellis.code import trellis_code

SIZE, THREADS = 4096, 2


def pairs() -> dict[str, tuple[Callable[[], object], str, Callable[[], object]]]:
    """Name -> (what is measured, what it is held against, that)."""
    kinds: dict[str, Callable[[], Any]] = {
        "k-means 256 x 4": partial(_vector, 4, 256),
        "k-means 16 x 2": partial(_vector, 2, 16),
        "residual 2 x 256 x 8": partial(_vector, 8, 256, stages=2),
        "product of 4, 256 x 4": partial(_vector, 4, 256, subspaces=4),
        "k-means 65,536 x 8": partial(_vector, 8, 65536),
        "columns 256 x 4": lambda: ColumnWeight(_vector(4, 256)),
        "scalar, groups of 64": _scalar,
        "grid, groups of 64": _grid,
        "lattice": _lattice,
        "trellis of 4,096 states": _trellis,
        "trellis of 4,096 states, rotated": lambda: _rotated(_trellis()),
        "two channel groups of k-means 256 x 4": _grouped,
        "k-means 256 x 4 and 0.5 % outliers": _outliers,
    }
    rows = {}
    for kind, weight in kinds.items():
        for dtype in (torch.float32, torch.bfloat16):
            against = f"torch's, {str(dtype).removeprefix('torch.')}"
            name = f"one token through 4096 x 4096 at 2 bits, {kind} ({against})"
            rows[name] = partial(_packed, kind, weight), against, partial(_torch, dtype)
        name = f"{FEW} tokens through 4096 x 4096 at 2 bits, {kind}"
        rows[name] = partial(_packed, kind, weight, FEW), "decoded, then torch's", partial(_decoded, kind, weight)
    return rows


_HELD: dict[str, PackedLinear] = {}


def _layer(kind: str, weight: Callable[[], Any]) -> PackedLinear:
    """Holds one layer at a time: it is made where a row begins."""
    if kind not in _HELD:
        _HELD.clear()
        made = weight()
        _HELD[kind] = PackedLinear(type(made), made.settings(), made.tensors(), None)
    return _HELD[kind]


def _packed(kind: str, weight: Callable[[], Any], number: int = 1) -> Tensor:
    return _on_threads(partial(_layer(kind, weight), _tokens(number)))


def _decoded(kind: str, weight: Callable[[], Any]) -> Tensor:
    layer = _layer(kind, weight)
    return _on_threads(lambda: torch.nn.functional.linear(_tokens(FEW), layer.weight))


def _torch(dtype: torch.dtype) -> Tensor:
    return _on_threads(partial(torch.nn.functional.linear, _tokens(1).to(dtype), _dense(dtype)))


def _on_threads(work: Callable[[], Tensor]) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        return work()
    finally:
        torch.set_num_threads(before)


@cache
def _tokens(number: int) -> Tensor:
    return torch.randn(number, SIZE, generator=generator(0, "benchmark", "token"))


@cache
def _dense(dtype: torch.dtype) -> Tensor:
    return torch.randn(SIZE, SIZE, generator=generator(0, "benchmark", "weight")).to(dtype)


def _codes(top: int, *shape: int) -> Tensor:
    return torch.randint(top, shape, generator=generator(0, "benchmark", "codes"), dtype=torch.int32)


def _vector(length: int, number: int, stages: int = 1, subspaces: int = 1, num_in: int = SIZE) -> VectorWeight:
    tables = torch.randn(stages * subspaces, number, length, generator=generator(0, "benchmark", "tables")).half()
    return VectorWeight(_codes(number, SIZE, num_in // length, stages), tables, num_in)


def _scalar() -> ScalarWeight:
    scales = torch.full((SIZE, SIZE // 64), 0.1).half()
    return ScalarWeight(_codes(4, SIZE, SIZE), _codes(4, SIZE, SIZE // 64), scales, 2, 64)


def _grid() -> GridWeight:
    return GridWeight(_codes(4, SIZE, SIZE), _codes(16, SIZE, SIZE // 64), torch.tensor([0.1, 0.7]).half(), 2, 4, 64)


def _lattice() -> LatticeWeight:
    return LatticeWeight(_codes(2**16, SIZE, SIZE // 8, 1), torch.tensor([0.5]).half(), 2, SIZE)


def _trellis() -> TrellisWeight:
    codes = _codes(256, SIZE // 16, SIZE // 16, 64).to(torch.uint8)
    return TrellisWeight(codes, trellis_code(2.0, 12), torch.tensor(0.3).half(), SIZE, SIZE)


def _rotated(inner: TrellisWeight) -> RotatedWeight:
    return RotatedWeight(inner, pack(_codes(2, SIZE), 1), pack(_codes(2, SIZE), 1), "layer")


def _grouped() -> GroupedWeight:
    halves = tuple(_vector(4, 256, num_in=SIZE // 2) for _ in range(2))
    return GroupedWeight(halves, pack_groups(torch.arange(SIZE) % 2), SIZE)


def _outliers() -> OutlierWeight:
    number = SIZE * SIZE // 200
    values = torch.randn(number, generator=generator(0, "benchmark", "outliers"))
    return OutlierWeight(_vector(4, 256), Outliers.of(torch.arange(number) * 200, values, 0, (SIZE, SIZE)))
