"""Tuning of one block after the other, each against its own full-precision output, before the next one is rounded."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from mgvq.tuning.descent import Descent


@dataclass(frozen=True, kw_only=True)
class Block(Descent):
    """Minimises the error of the block's output behind the quantised blocks before it, docs/method.md, eq. (block-tuning), over
    what `tables` tunes in it (as QuIP#, AQLM and VPTQ do).

    Tables that layers of other blocks share stay as they are.
    """

    within: ClassVar[Literal["block", "model"]] = "block"
    whole_towers: ClassVar[bool] = False
    embeddings: ClassVar[bool] = False
