"""What may be declared of a model's family where looking at its modules does not tell it, or tells it wrongly.

It is kept in the model's config (`mgvq_family`), hence in every checkpoint, so that the model that is read back is taken apart
alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PretrainedConfig

from mgvq.errors import UserError

TOWERS = ("vision", "projector", "language")
_KEY = "mgvq_family"


@dataclass(frozen=True, kw_only=True)
class Family:
    """What is declared; None: it is found out (towers.py, sites.py, pack.py)."""

    towers: Mapping[str, Sequence[str]] | None = None  # the names of the modules of each tower, in the order of the data
    shared_inputs: Mapping[str, str] | None = (
        None  # layers of one parent that read the same, by a name for that: {q_proj: qkv, ..}
    )
    packable: bool | None = None  # whether questions about one image may share a row, kept apart by nothing but the mask

    def __post_init__(self) -> None:
        if self.towers is not None and (unknown := sorted(set(self.towers) - set(TOWERS))):
            raise UserError(f"model.family.towers has no {', '.join(unknown)}; there are {', '.join(TOWERS)}.")
        if self.towers is not None and not self.towers.get("language"):
            raise UserError("model.family.towers must name the modules of the language tower, whose blocks are quantised.")
        if self.packable not in (None, True, False):
            raise UserError(f"model.family.packable must be true, false or null, got {self.packable!r}")

    def declared(self) -> dict[str, Any]:
        """All that is declared."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def declare(config: PretrainedConfig, family: Family) -> None:
    """Keep what is declared in the config; a family without declarations leaves it as it is."""
    if declared := family.declared():
        setattr(config, _KEY, declared)


def family_of(config: PretrainedConfig) -> Family:
    """What was declared of the model with this config."""
    return Family(**(getattr(config, _KEY, None) or {}))
