"""Whether a built variant offers what the protocol of its group asks for, so that a forgotten property is told by its name."""

import inspect
from typing import Any

from mgvq.errors import UserError
from mgvq.tracker import Tracker


def check_offers(part: Any, group: str) -> None:
    """Raises UserError where the variant lacks members of its group's protocol."""
    protocol = _protocol(group)
    if protocol is None:
        return
    asked = {name for name in vars(protocol) if not name.startswith("_")} | set(inspect.get_annotations(protocol))
    asked |= {"__call__"} & set(vars(protocol))
    nothing = object()
    if missing := sorted(name for name in asked if inspect.getattr_static(part, name, nothing) is nothing):
        kind = type(part)
        raise UserError(
            f"{group}: {kind.__module__}.{kind.__qualname__} has no {' and no '.join(missing)}; the protocol "
            f"{protocol.__module__}.{protocol.__qualname__} says what that is."
        )


def _protocol(group: str) -> type | None:
    """None for the model, which is built as a `Source`."""
    if group == "model":
        return None
    if group == "tracker":
        return Tracker
    from mgvq import protocols  # here: it imports torch, as the variants of all other groups do

    return getattr(protocols, "Task" if group == "evaluation" else group.capitalize())
