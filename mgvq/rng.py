"""Named random streams: every draw of a run comes from `generator(seed, name, ...)`, nothing from a global state."""

import zlib

import numpy as np
import torch


def entropy(seed: int, *names: str | int) -> int:
    """A 63-bit number from the seed and the stream's name; equal names give equal numbers in every process."""
    words = [seed, *(n if isinstance(n, int) else zlib.crc32(n.encode()) for n in names)]
    high, low = np.random.SeedSequence(words).generate_state(2, np.uint32).tolist()
    return (high << 31) | (low >> 1)


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for one named stream (draws on other devices are made here and moved)."""
    return torch.Generator().manual_seed(entropy(seed, *names))
