"""The digests of a checkpoint's files, and the check that they are still what was written: weights, settings, tokenizer."""

import json
from collections.abc import Collection
from pathlib import Path

from mgvq.digest import file_digest
from mgvq.errors import UserError
from mgvq.model.files import read_json

DIGESTS = "mgvq.digests.json"
# Files of other kinds (a README, what a file browser leaves) may be put beside a checkpoint: nothing reads them.
_READ = (".json", ".jinja", ".txt", ".model", ".py", ".safetensors", ".bin", ".pt")


def write_digests(folder: Path) -> None:
    """Write `mgvq.digests.json`: the SHA-256 of every other file of the folder by its name in it. The last step of saving."""
    digests = {name: file_digest(folder / name) for name in _names(folder)}
    (folder / DIGESTS).write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def check_digests(folder: Path, *, leave_out: Collection[str] = ()) -> None:
    """Raises UserError, with names, where files are not those that were written: altered, missing, or added.

    `leave_out`: names of files that the caller does not read.
    """
    digests = read_json(folder / DIGESTS)
    found = _names(folder)
    altered = [n for n in found if n in digests and n not in leave_out and file_digest(folder / n) != digests[n]]
    missing = sorted(set(digests) - set(found))
    added = [n for n in found if n not in digests and Path(n).suffix in _READ]
    problems = [
        f"{', '.join(names)} {what}" for names, what in ((altered, "altered"), (missing, "missing"), (added, "added")) if names
    ]
    if problems:
        raise UserError(
            f"{folder} is not the checkpoint that was written: {'; '.join(problems)} (by the digests in {DIGESTS}). Take the "
            "run's own copy, or make it again; verify=False loads it as it is, on your own responsibility."
        )


def _names(folder: Path) -> list[str]:
    files = (f for f in folder.rglob("*") if f.is_file())
    return sorted(name for f in files if (name := f.relative_to(folder).as_posix()) != DIGESTS)
