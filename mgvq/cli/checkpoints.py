"""What the commands that read a checkpoint have in common: where it is, and that mistakes end in one paragraph."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mgvq.errors import UserError


def checkpoint_folder(path: Path) -> Path:
    """The checkpoint that is meant by `path`: the folder itself, or `checkpoint/` in a run folder."""
    inner = path / "checkpoint"
    return inner if inner.is_dir() else path


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
