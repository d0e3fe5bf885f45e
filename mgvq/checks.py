"""Checks of single values, and the way from whatever a library raises on a bad file to a sentence of our own."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mgvq.errors import UserError

_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a whole commit, which cannot move as a branch or a tag may."""
    return _COMMIT.fullmatch(revision or "") is not None


def whole_number(name: str, value: Any, *, least: int = 0, most: int | None = None, why: str = "") -> None:
    """Raises UserError unless the setting `name` is a whole number from `least` to `most`; true and false are none.

    `why` says what is wrong with other numbers, as a sentence of its own.
    """
    if type(value) is int and least <= value and (most is None or value <= most):
        return
    span = f">= {least}" if most is None else f"from {least} to {most}"
    raise UserError(f"{name} must be a whole number {span}, got {value!r}.{f' {why}' if why else ''}")


@contextmanager
def told_as(what: str, advice: str) -> Iterator[None]:
    """Whatever a library raises inside becomes `UserError: WHAT (its words). ADVICE`.

    Libraries that read files raise all sorts of things, which no list of types would hold. A UserError passes as it is, and so
    does memory that ran out, which is no fault of the file.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
            raise
        raise UserError(f"{what} ({short_words(error)}). {advice}") from error


def short_words(error: BaseException, limit: int = 300) -> str:
    """What the error says, on one line, with its type where it says nothing or does not say what it is about."""
    words = " ".join(str(error).split())
    text = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
