"""What parts of a model put out, computed once a batch while their weights stay: passes begin where something may change."""

import copy
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class Replay:
    """`rows`: modules of one row pass their output on to the next of it, as the blocks of a tower do.

    `with replay(batch_key):` stands around a forward pass. A settled module, and all before it in its row, is run once more for
    every batch and then not again; the output of the last one is kept. Whoever changes the weights of a settled module must
    `unsettle` first.
    """

    def __init__(self, model: torch.nn.Module, rows: Sequence[Sequence[str]]) -> None:
        self._model = model
        self._row = {name: row for row in rows for name in row}
        self._settled: list[str] = []
        self._kept: dict[tuple[Hashable, str], list[Any]] = {}

    def settle(self, name: str) -> None:
        """The modules of a row in their order."""
        self._settled.append(name)

    def unsettle(self) -> None:
        """All modules of rows of more than one: those may have changed."""
        self._settled = [name for name in self._settled if len(self._row[name]) == 1]
        self._kept = {key: outputs for key, outputs in self._kept.items() if key[1] in self._settled}

    @contextmanager
    def __call__(self, batch: Hashable) -> Iterator[None]:
        modules = {name: self._model.get_submodule(name) for name in self._settled}
        for name, module in modules.items():
            module.forward = _Player(self, batch, name, module.forward)
        try:
            yield
        finally:
            for module in modules.values():
                del module.forward  # the class has its own

    def find(self, batch: Hashable, name: str) -> list[Any] | None:
        """The kept outputs of the module, or of one behind it, whose input then does not matter."""
        row = self._row[name]
        for later in row[row.index(name) :]:
            if (batch, later) in self._kept:
                return self._kept[batch, later]
        return None

    def keep(self, batch: Hashable, name: str, outputs: list[Any]) -> None:
        row = self._row[name]
        for earlier in row[: row.index(name)]:
            self._kept.pop((batch, earlier), None)
        self._kept[batch, name] = outputs


class _Player:
    """Stands in for the `forward` of a module, in one pass; a module that is called several times is played in that order."""

    def __init__(self, replay: Replay, batch: Hashable, name: str, run: Any) -> None:
        self._replay, self._batch, self._name, self._run = replay, batch, name, run
        self._played = replay.find(batch, name)
        self._outputs: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._run(*args, **kwargs) if self._played is None else self._played[len(self._outputs)]
        self._outputs.append(output)
        if self._played is None:
            self._replay.keep(self._batch, self._name, self._outputs)
        return _fresh(output)


def _fresh(output: Any) -> Any:
    """Models write into what a part returns (Qwen2-VL splits its tower's features there): what is kept stays as it was."""
    return output if isinstance(output, torch.Tensor) else copy.copy(output)
