"""Tuning of the quantised layers against the teacher: their tables and scales, with the norms and biases of their blocks."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from mgvq.tuning.descent import Descent


@dataclass(frozen=True, kw_only=True)
class Tables(Descent):
    """Minimises the divergence of the whole model's answers from the teacher's, docs/method.md, eq. (tuning), over what the
    quantised layers store beside codes, their biases, and all vectors of their blocks: norms above all."""

    within: ClassVar[Literal["block", "model"]] = "model"
    whole_towers: ClassVar[bool] = False
    embeddings: ClassVar[bool] = False
