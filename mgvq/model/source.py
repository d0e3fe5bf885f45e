"""Where a model comes from: a folder in the hub's format, a shipped small model, or a pinned hub repository."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from mgvq.errors import UserError

SHIPPED = Path(__file__).parent / "tiny"
_WEIGHTS = (".safetensors", ".bin")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class Source:
    """`path`: a folder, or `organisation/name` on the hub with its 40-digit commit as `revision`; `dtype` of the computation."""

    name: str
    path: str
    revision: str | None
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"model.dtype must be float32, bfloat16 or float16, got {self.dtype!r}")

    @property
    def folder(self) -> Path | None:
        """The local folder, None for a hub name."""
        return Path(self.path) if Path(self.path).is_dir() else None

    def identity(self) -> str:
        """What determines the weights: a digest of a folder's files, or the hub name with its commit.

        Raises UserError where the folder is missing or holds no weights, or a hub name comes without a full commit.
        """
        if folder := self.folder:
            return folder_digest(folder)
        if not _HUB_NAME.fullmatch(self.path) or self.path.startswith("."):
            raise UserError(
                f"model.path={self.path} is neither a folder nor a hub name (organisation/name). Give the folder that holds "
                "config.json and the safetensors."
            )
        if not _COMMIT.fullmatch(self.revision or ""):
            raise UserError(
                f"model.path={self.path} is not a local folder, so it is taken as a hub name, and that needs "
                f"model.revision=<the 40 hex digits of a commit>, got {self.revision!r}: a branch may change."
            )
        return f"{self.path}@{self.revision}"


def folder_digest(folder: Path) -> str:
    """SHA-256 over names and bytes of every file that a model is loaded from."""
    if not (folder / "config.json").is_file() or not any(f.suffix in _WEIGHTS for f in folder.iterdir()):
        raise UserError(f"model folder {folder} holds no model: it needs config.json and {' or '.join(_WEIGHTS)} files.")
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (*_WEIGHTS, ".json", ".jinja", ".txt", ".model"):
            with file.open("rb") as stream:
                digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
