"""The bits ledger: every byte of a checkpoint, by what it is stored for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from mgvq.types import Tower

Part = Tower | Literal["other", "container"]
"""A tower; `other`: head and embeddings outside of the towers; `container`: headers of the shards, and the index."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor, or a part of the container."""

    tensor: str
    """The name of the tensor in the file."""
    part: Part
    """What it is a part of."""
    quantized: bool
    """The tensor belongs to a layer in scope."""
    num_bytes: int
    """The bytes that it takes in the file."""
    num_weights: int
    """The parameters of the model that it stands for; 0 for tables, scales and headers."""


@dataclass(frozen=True)
class Ledger:
    """All entries of a checkpoint, and their sums over three denominators."""

    entries: Sequence[Entry]

    @property
    def num_bytes(self) -> int:
        return sum(e.num_bytes for e in self.entries)

    def bits(self) -> Mapping[str, float]:
        """The stored bits a weight: of the layers in scope, of the language model, and of the whole model with all overhead."""
        return {
            "bits/quantized_layers": self._bits([e for e in self.entries if e.quantized]),
            "bits/language_model": self._bits([e for e in self.entries if e.part == "language"]),
            "bits/model": self._bits(self.entries),
        }

    def scope_bits(self) -> int:
        """The stored bits of the layers in scope."""
        return 8 * sum(e.num_bytes for e in self.entries if e.quantized)

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame([(e.tensor, e.part, e.quantized, e.num_bytes, e.num_weights) for e in self.entries],
                            columns=["tensor", "part", "quantized", "num_bytes", "num_weights"])  # fmt: skip

    @staticmethod
    def _bits(entries: Sequence[Entry]) -> float:
        return 8 * sum(e.num_bytes for e in entries) / max(1, sum(e.num_weights for e in entries))
