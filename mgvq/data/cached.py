"""Where the datasets library keeps what it has read from a local folder."""

import hashlib
from pathlib import Path


def cache_of(folder: Path) -> str:
    """A folder in the library's cache for the files of `folder` as they are now.

    By itself the library tells copies of the hub's datasets apart by their README alone: what was read from one would be taken
    for what is in another, and for what is in the same folder after its files have changed.
    """
    from datasets.config import HF_DATASETS_CACHE  # here: it takes a second

    digest = hashlib.sha256(str(folder.resolve()).encode())
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        found = file.stat()
        digest.update(f"{file.relative_to(folder)} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}\n".encode())
    return str(Path(HF_DATASETS_CACHE) / "mgvq" / digest.hexdigest()[:16])
