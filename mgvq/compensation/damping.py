"""The check of a damping, which all compensations share."""

from mgvq.errors import UserError


def check_damping(key: str, share: float) -> None:
    """Raises UserError for a share of a mean diagonal that does not lie in (0, 1]."""
    if not 0 < share <= 1:
        raise UserError(f"compensation.{key} must lie in (0, 1], got {share!r}")
