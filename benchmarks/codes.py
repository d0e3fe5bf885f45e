"""What coding by trellis and lattice and rotating cost, against matrix products."""

from collections.abc import Callable
from functools import partial

import numba
import torch

from mgvq.lattice.nearest import nearest_e8p
from mgvq.rng import generator
from mgvq.rotation import random_signs, rotate
from mgvq.trellis.code import trellis_code
from mgvq.trellis.coding import decode, encode


def pairs() -> dict[str, tuple[Callable[[], object], str, Callable[[], object]]]:
    """Name -> (what is measured, what it is held against, that)."""
    numba.set_num_threads(1)
    draws = generator(0, "benchmark codes")
    square = torch.randn(1024, 1024, generator=draws)
    product = "1024^3 matrix product", partial(torch.mm, square, square)
    rows = {}
    for state_bits, num_sequences in ((8, 1024), (10, 512), (12, 128), (14, 32)):
        code, targets = trellis_code(2.0, state_bits), torch.randn(num_sequences, 256, generator=draws)
        name = f"trellis of {1 << state_bits:,} states, {num_sequences} x 256 at 2 bits"
        rows[f"{name}, encoding"] = (partial(encode, targets, code), *product)
        rows[f"{name}, decoding"] = (partial(decode, encode(targets, code), code, 256), *product)
    rows["E8P, nearest of 65,536 points, 32,768 x 8"] = (partial(nearest_e8p, square.view(-1, 8)[:32768]), *product)
    signs = random_signs(1024, draws)
    rows["rotation of 1024 x 1024"] = (partial(rotate, square, signs), *product)
    return rows
