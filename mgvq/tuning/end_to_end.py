"""Tuning of all that is continuous in the towers in scope against the teacher."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from mgvq.errors import UserError
from mgvq.tuning.descent import Descent


@dataclass(frozen=True, kw_only=True)
class EndToEnd(Descent):
    """Minimises what `tables` does, over all parameters of the towers in scope that are no codes: norms outside of the blocks,
    position embeddings and convolutions too."""

    embeddings: bool
    """Whether token embedding and head, which no tower holds, are tuned as well (QuIP# and QTIP tune the head)."""
    within: ClassVar[Literal["block", "model"]] = "model"
    whole_towers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.embeddings, bool):
            raise UserError(f"tuning.embeddings must be true or false, got {self.embeddings!r}")
