"""Faults that a process inflicts on itself, at a moment named by a function: a signal, or the death of its children.

`MGVQ_FAULT` says which, as JSON: `{"at": "MODULE:NAME", "when": "before" | "after", "call": 1, "do": "SIGKILL" | "KILL CHILDREN",
"once": FILE}`. With `once` only the first process of all that come by is hit: the one that can make the file.
"""

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "MGVQ_FAULT"


def arm(fault: dict[str, Any]) -> None:
    """Put the fault into its function, now where the module is there, else when it is imported."""
    module, _, name = fault["at"].partition(":")
    if module in sys.modules:
        _wrap(sys.modules[module], name, fault)
    else:
        sys.meta_path.insert(0, _OnImport(module, lambda loaded: _wrap(loaded, name, fault)))


def arm_from_environment() -> None:
    """What `sitecustomize` does in every process that starts."""
    if VARIABLE in os.environ:
        arm(json.loads(os.environ[VARIABLE]))


def _wrap(module: ModuleType, name: str, fault: dict[str, Any]) -> None:
    *above, last = name.split(".")
    owner: Any = module
    for part in above:
        owner = getattr(owner, part)
    real = getattr(owner, last)
    calls = 0

    @wraps(real)
    def struck(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        due = calls == fault.get("call", 1)
        if due and fault["when"] == "before":
            _strike(fault)
        found = real(*given, **named)
        if due and fault["when"] == "after":
            _strike(fault)
        return found

    setattr(owner, last, struck)


def _strike(fault: dict[str, Any]) -> None:
    if "once" in fault:
        try:
            Path(fault["once"]).touch(exist_ok=False)
        except FileExistsError:
            return
    if fault["do"] == "KILL CHILDREN":
        import psutil

        for child in psutil.Process().children(recursive=True):
            child.kill()
    else:
        os.kill(os.getpid(), signal.Signals[fault["do"]])


class _OnImport(MetaPathFinder, Loader):
    """Calls `then` with the module as soon as it is imported."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        self.real = PathFinder.find_spec(name, path)
        return self.real and ModuleSpec(name, self, origin=self.real.origin, is_package=False)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return importlib.util.module_from_spec(self.real)  # type: ignore[arg-type]

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.real
        self.real.loader.exec_module(module)  # type: ignore[union-attr]
        self.then(module)
