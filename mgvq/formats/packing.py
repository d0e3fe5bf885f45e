"""Integers of 1 to 31 bits packed without gaps into bytes: little-endian, the lowest bit first."""

import torch
from jaxtyping import Int, Integer, UInt8
from torch import Tensor

MAX_WIDTH = 31
_CHUNK = 1 << 20  # values whose bits lie side by side in memory; a multiple of 8, so that chunks end with a byte


def packed_bytes(count: int, width: int) -> int:
    """The size of `count` integers of `width` bits in whole bytes, so with at most 7 bits of padding."""
    return -(-count * width // 8)


def narrowest(codes: Integer[Tensor, "*shape"], width: int) -> Integer[Tensor, "*shape"]:
    """Values of [0, 2^width) in the fewest bytes each: how codes wait in memory, where packed bits would be slow to read."""
    return codes.to(torch.uint8 if width <= 8 else torch.int16 if width <= 15 else torch.int32)


def pack(values: Integer[Tensor, "n"], width: int) -> UInt8[Tensor, "bytes"]:
    """Pack values of [0, 2^width). Raises ValueError for a width outside 1..31 or a value that does not fit."""
    _check(width)
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < 2**width:
        raise ValueError(f"values in [{int(values.min())}, {int(values.max())}] do not fit into {width} bits")
    return torch.cat([_pack(part, width) for part in values.split(_CHUNK)])


def unpack(packed: UInt8[Tensor, "bytes"], width: int, count: int) -> Int[Tensor, "n"]:
    """Return the `count` values that `pack` was given, as int32. Raises ValueError where the bytes are too few or too many."""
    _check(width)
    if len(packed) != packed_bytes(count, width):
        raise ValueError(f"{count} values of {width} bits take {packed_bytes(count, width)} bytes, found {len(packed)}")
    sizes = [min(_CHUNK, count - start) for start in range(0, max(count, 1), _CHUNK)]
    parts = packed.split([packed_bytes(size, width) for size in sizes])
    return torch.cat([_unpack(part, width, size) for part, size in zip(parts, sizes, strict=True)])


def _pack(values: Integer[Tensor, "n"], width: int) -> UInt8[Tensor, "bytes"]:
    bits = (values.to(torch.int32)[:, None] >> torch.arange(width, device=values.device)) & 1
    stream = bits.to(torch.uint8).flatten()
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8, device=values.device)).sum(1, dtype=torch.uint8)


def _unpack(packed: UInt8[Tensor, "bytes"], width: int, count: int) -> Int[Tensor, "n"]:
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    bits = bits.flatten()[: count * width].view(count, width).to(torch.int32)
    return (bits << torch.arange(width, dtype=torch.int32, device=packed.device)).sum(1, dtype=torch.int32)


def _check(width: int) -> None:
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"a packed integer has 1 to {MAX_WIDTH} bits, not {width}")
