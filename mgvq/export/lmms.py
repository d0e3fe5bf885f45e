"""A checkpoint as lmms-eval loads it by its own command line: the wrapper of our runs around a model that is read from disk."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.instance import Instance

from mgvq.checkpoint.load import load, load_processor
from mgvq.errors import UserError
from mgvq.evaluation.harness import InProcessModel
from mgvq.model.source import DTYPES

log = logging.getLogger(__name__)


class CheckpointModel(InProcessModel):
    """A checkpoint for lmms-eval's own command line, `--model mgvq --model_args pretrained=CHECKPOINT`.

    The further arguments are those of `mgvq.load`; `batch_size` and `device` are lmms-eval's own options.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "float32",
        packed: bool = False,
        attention: str | None = None,
        trust_remote_code: bool = False,
        max_batch_size: Any = None,
    ) -> None:
        """Raises UserError for a checkpoint that cannot be loaded, a batch size that is no number, and an unknown dtype."""
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"--batch_size must be a whole number >= 1, got {batch_size!r}: no size is searched for here.")
        if dtype not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        trusted = {"trust_remote_code": trust_remote_code}
        where = "auto" if device is None else device
        model = load(pretrained, dtype=getattr(torch, dtype), device=where, packed=packed, attention=attention, **trusted)
        super().__init__(model, load_processor(pretrained, **trusted), int(batch_size))

    def answers(self, requests: Sequence[Instance]) -> list[str]:
        """As in process, where a run flags it: what could not be asked, or was answered with NaN, is told aloud."""
        before = self.replies
        self.replies = {}
        answers = super().answers(requests)
        refused = [reply.refused for reply in self.replies.values() if reply.refused is not None]
        broken = sum(not reply.finite for reply in self.replies.values())
        self.replies = before
        task = requests[0].args[4]  # type: ignore[misc]
        if refused:
            log.warning("%s: %d questions could not be asked and count as wrong; the first: %s", task, len(refused), refused[0])
        if broken:
            log.warning("%s: %d answers were chosen from NaN or infinite logits, and are empty", task, broken)
        return answers
