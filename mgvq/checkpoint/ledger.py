"""The bits ledger: every byte of a checkpoint, by what it is stored for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor."""

    tensor: str
    part: str  # a tower, `other` (head, embeddings outside the towers) or `container` (headers, json)
    quantized: bool  # belongs to a layer in scope
    num_bytes: int
    num_weights: int  # parameters it stands for; 0 for tables, scales and headers


@dataclass(frozen=True)
class Ledger:
    """Sums of entries over three denominators."""

    entries: Sequence[Entry]

    @property
    def num_bytes(self) -> int:
        return sum(e.num_bytes for e in self.entries)

    def bits(self) -> Mapping[str, float]:
        """Stored bits a weight of the layers in scope, of the language model, and of the whole model with all overhead."""
        return {
            "bits/quantized_layers": self._bits([e for e in self.entries if e.quantized]),
            "bits/language_model": self._bits([e for e in self.entries if e.part == "language"]),
            "bits/model": self._bits(self.entries),
        }

    def scope_bits(self) -> int:
        """Stored bits of the layers in scope."""
        return 8 * sum(e.num_bytes for e in self.entries if e.quantized)

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame([(e.tensor, e.part, e.quantized, e.num_bytes, e.num_weights) for e in self.entries],
                            columns=["tensor", "part", "quantized", "num_bytes", "num_weights"])  # fmt: skip

    @staticmethod
    def _bits(entries: Sequence[Entry]) -> float:
        return 8 * sum(e.num_bytes for e in entries) / max(1, sum(e.num_weights for e in entries))
