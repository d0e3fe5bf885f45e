"""What the commands that read a checkpoint have in common: where it is."""

from pathlib import Path


def checkpoint_folder(path: Path) -> Path:
    """The checkpoint that is meant by `path`: the folder itself, or `checkpoint/` in a run folder."""
    inner = path / "checkpoint"
    return inner if inner.is_dir() else path
