"""Digests of the data that settings name: what is in it counts, not where it lies."""

import contextlib
import hashlib
import json
from pathlib import Path

from mgvq.calibration.rows import image_names


def file_digest(file: Path) -> str:
    """SHA-256 in hex, read in pieces; of nothing for a missing file, which is reported later."""
    if not file.is_file():
        return hashlib.sha256().hexdigest()
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def listing_digest(folder: Path) -> str:
    """Of the names and sizes of a dataset's files, which are too large to read; a missing folder is reported later."""
    files = sorted((f.relative_to(folder).as_posix(), f.stat().st_size) for f in folder.rglob("*.parquet"))
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def data_digest(path: str) -> str:
    """SHA-256 over a folder's files, or a file and the images that its JSON lines name. Anything else, as a hub name, stays."""
    data, digest = Path(path), hashlib.sha256()
    if data.is_dir():
        for file in sorted(f for f in data.rglob("*") if f.is_file()):
            digest.update(f"{file.relative_to(data).as_posix()} {file_digest(file)}\n".encode())
    elif data.is_file():
        content = data.read_bytes()
        digest.update(content)
        for line in content.split(b"\n") if data.suffix != ".json" else ():  # as calibration.rows.lines cuts them
            with contextlib.suppress(ValueError, RecursionError):  # reported later, as missing images are
                for name in image_names(json.loads(line)):
                    digest.update(_bytes(data.parent / name))
    else:
        return path
    return digest.hexdigest()


def _bytes(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""
