"""Annotations are checked at the first calls of every function in every test; later calls of the same test go without.

jaxtyping's check takes about .2 ms, and a test may encode 40,000 vectors: it was half of the suite's time. Fixtures count to
the test that asks for them first. MGVQ_CHECKED_CALLS=1000000 checks all, as `make trust` does.

This module is imported before mgvq, whose modules are decorated as they are imported (`--jaxtyping-packages` in pyproject.toml).
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import jaxtyping

assert "mgvq.types" not in sys.modules, "mgvq is imported already, with the check at every call"

CHECKED = int(os.environ.get("MGVQ_CHECKED_CALLS", "5"))
_present = 0
_jaxtyped = jaxtyping.jaxtyped


def new_test() -> None:
    """All functions are checked again from here on."""
    global _present
    _present += 1


def _limited(*arguments: Any, **settings: Any) -> Callable[[Any], Any]:
    """The decorator `jaxtyping.jaxtyped`, whose check ends after so many calls in one test; classes are left to the original."""
    decorate = _jaxtyped(*arguments, **settings)

    def decorated(thing: Any) -> Any:
        checked = decorate(thing)
        if isinstance(thing, type):
            return checked
        test, calls = 0, 0

        @functools.wraps(checked)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal test, calls
            if test != _present:
                test, calls = _present, 0
            if calls >= CHECKED:
                return thing(*args, **kwargs)
            calls += 1
            return checked(*args, **kwargs)

        return call

    return decorated


jaxtyping.jaxtyped = _limited
