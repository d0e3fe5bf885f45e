"""What a variant's yaml declares of it under `_declares_`, so that runs are planned without importing the variant, or torch.

    _declares_:
      idle: true                   # the variant leaves everything as it is: it is no part of a run's identity
      identity: {path: content}    # how its settings count in a run's identity (`mgvq.runs.identity`)
      kind: {headline: ...}        # what tables make of an evaluation's metrics (`mgvq.studies.kinds`)
      metrics: {loss/answer: min}  # what an evaluation measures, and which way is better (`mgvq.runs.objective`)
      numerics: 1                  # raised by a commit that moves numbers of this variant alone

What only a built variant is asked for is a property of the protocols (`mgvq.protocols`).
"""

from collections.abc import Mapping
from typing import Any

from mgvq.errors import UserError

KEY = "_declares_"
_WORDS = ("idle", "identity", "kind", "metrics", "numerics")


def declared(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The declarations in the settings of one group; none for a yaml without them. Raises UserError for an unknown word."""
    found = settings.get(KEY) or {}
    if unknown := sorted(set(found) - set(_WORDS)):
        raise UserError(f"{settings.get('_target_')}: {KEY} has no {', '.join(unknown)}; there are {', '.join(_WORDS)}.")
    return found


def is_idle(settings: Mapping[str, Any]) -> bool:
    """Whether the variant of a group leaves everything as it is: `none`, and those that say so."""
    return settings.get("_target_") is None or bool(declared(settings).get("idle", False))
