"""The check of a damping, which all compensations share."""

from mgvq.errors import UserError
from mgvq.linalg import DAMPING_OF


def check_damping(key: str, share: float, of: str = "mean") -> None:
    """Raises UserError for a share that does not lie in (0, 1], and for a word that says of what."""
    if not 0 < share <= 1:
        raise UserError(f"compensation.{key} must lie in (0, 1], got {share!r}")
    if of not in DAMPING_OF:
        raise UserError(f"compensation.damping_of must be one of {', '.join(DAMPING_OF)}; got {of!r}")
