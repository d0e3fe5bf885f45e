"""How commands end for what a person has to mend, and for Ctrl-C: in one paragraph, without a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mgvq.errors import UserError


@contextmanager
def mistakes_told(command: str) -> Iterator[None]:
    """Inside, a UserError is printed and ends the command with status 2, Ctrl-C with 130."""
    try:
        yield
    except UserError as error:
        print(f"{command}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{command}: interrupted.", file=sys.stderr)
        sys.exit(130)
