"""Settings of another type than the field that takes them, told by name where a class fails over one."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin

_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list",
    Sequence: "a list",
    Mapping: "a mapping",
    type(None): "null",
}


def wrong_type(kind: Any, settings: Mapping[str, Any]) -> str | None:
    """`FIELD must be a number, got 'many'` for the first setting that is not what its field of the dataclass is annotated with.

    None where all fit, and for what is no dataclass. Annotations of other types than those of yaml are not looked at.
    """
    for field in fields(kind) if is_dataclass(kind) else ():
        parts = get_args(field.type) if get_origin(field.type) in (types.UnionType, Union) else (field.type,)
        allowed = [get_origin(part) or part for part in parts]
        if field.name in settings and all(t in _WORDS for t in allowed) and not _fits(settings[field.name], allowed):
            words = " or ".join(_WORDS[t] for t in allowed)
            return f"{field.name} must be {words}, got {settings[field.name]!r}"
    return None


def _fits(value: Any, allowed: list[Any]) -> bool:
    if isinstance(value, dict):
        return Mapping in allowed
    if isinstance(value, list):
        return list in allowed or Sequence in allowed
    return type(value) in allowed or (type(value) is int and float in allowed)
