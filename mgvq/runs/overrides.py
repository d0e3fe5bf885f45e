"""Words KEY=VALUE in Hydra's grammar: read with errors of our own, and written so that any value is read as it is."""

import functools
import re
from collections.abc import Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from mgvq.errors import UserError

_PLAIN = re.compile(r"[\w./:@%+-]+", re.ASCII)  # what the grammar takes without quotes, and as nothing else


@functools.lru_cache(4096)
def parsed(word: str) -> Override:
    """The word as Hydra reads it, which is not to be changed.

    Raises UserError that shows the quotes that a value needs, where it cannot be read.
    """
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{word} is no setting: give KEY=VALUE, see mgvq-run --help.") from error
        raise UserError(
            f"{word} cannot be read: a value with brackets, commas, spaces, quotes, = or letters beyond a to z stands in quotes, "
            f"and these in the shell's: '{key}={quoted(value)}'"
        ) from error


def key_of(word: str) -> str:
    """What the word sets: `a.b` of `a.b=1`, of `+a.b=1`, which adds it, and of `~a.b`, which drops it."""
    return word.partition("=")[0].strip().lstrip("+~")


def override(key: str, value: Any) -> str:
    """The word that sets `key` to a value out of a YAML file.

    A text is in quotes where it has anything but letters, digits and `./:@%+-_`; without them `1e-3`, which YAML takes for text,
    stays a number.
    """
    return f"{key}={_written(value)}"


def quoted(text: str) -> str:
    r"""The text in the quotes in which the grammar takes any text. A `\` is doubled before a quote and at the end alone."""
    return '"' + re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + found[2].replace('"', r"\""), text) + '"'


def _written(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) else quoted(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_written(own)}" for key, own in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_written, value)) + "]"
    return str(value)
