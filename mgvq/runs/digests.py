"""Digests of the data that settings name: what is in it counts, not where it lies."""

import codecs
import contextlib
import hashlib
import json
from pathlib import Path

from mgvq.calibration.rows import image_names
from mgvq.digest import file_digest


def data_digest(path: str) -> str:
    """The SHA-256 of a folder's files, or of a file and the images that its JSON lines name. Other texts, as a hub name, stay."""
    data, digest = Path(path), hashlib.sha256()
    if data.is_dir():
        for file in sorted(f for f in data.rglob("*") if f.is_file()):
            digest.update(f"{file.relative_to(data).as_posix()} {file_digest(file)}\n".encode())
    elif data.is_file():
        content = data.read_bytes()
        digest.update(content)
        is_list = content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")  # which names no files beside it
        lines = () if is_list else content.split(b"\n")  # as calibration.rows.lines cuts them
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):  # reported later, as missing images are
                for name in image_names(json.loads(line)):
                    digest.update(_bytes(data.parent / name))
    else:
        return path
    return digest.hexdigest()


def _bytes(file: Path) -> bytes:
    """The content of the file; nothing where none can be read, as of a data URL, which is too long for a path."""
    with contextlib.suppress(OSError):
        return file.read_bytes() if file.is_file() else b""
    return b""
