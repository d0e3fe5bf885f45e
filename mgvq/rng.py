"""Named random streams: every draw of a run comes from `generator(seed, name, ...)`, nothing from a global state."""

import hashlib

import torch


def entropy(seed: int, *names: str | int) -> int:
    """A 63-bit number from the seed and the stream's name; equal names give equal numbers in every process."""
    return int.from_bytes(hashlib.sha256(repr((seed, *names)).encode()).digest()[:8], "little") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for one named stream (draws on other devices are made here and moved)."""
    return torch.Generator().manual_seed(entropy(seed, *names))
