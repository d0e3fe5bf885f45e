"""The digests of a checkpoint's files, and the check that they are still what was written: weights, settings, tokenizer."""

import json
from collections.abc import Collection
from pathlib import Path

from mgvq.digest import file_digest
from mgvq.errors import UserError
from mgvq.model.files import read_json

DIGESTS = "mgvq.digests.json"
# Files of other kinds (a model card, what a file browser leaves) may be put beside a checkpoint, or edited: nothing reads them.
_READ = (".index", ".json", ".jinja", ".txt", ".model", ".py", ".safetensors", ".bin", ".pt")


def write_digests(folder: Path, *, closed: bool = True) -> None:
    """Write `mgvq.digests.json`: the SHA-256 of every other file of the folder by its name in it. The last step of saving.

    Where it is not `closed`, files that a loader reads may be added later, as a tokenizer that is saved by itself.
    """
    digests = {name: file_digest(folder / name) for name in _names(folder)}
    content = {"closed": closed, "files": digests}
    temporary = folder / f"{DIGESTS}.tmp"
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(folder / DIGESTS)  # and not written into: it may be the same file as another run's


def check_digests(folder: Path, *, leave_out: Collection[str] = (), everything: bool = False) -> None:
    """Raises UserError, with names, where files are not those that were written: altered, missing, or added.

    Only files of kinds that a loader reads count, unless `everything` is asked for. `leave_out`: names of files that the caller
    does not read.
    """
    content = read_json(folder / DIGESTS)
    digests = content.get("files", content)  # the first checkpoints of version 3 have the digests alone
    if not isinstance(digests, dict) or not digests:
        raise UserError(f"{folder / DIGESTS} holds no digests. Take the run's own copy of the checkpoint, or make it again.")
    counted = {name for name in digests if everything or Path(name).suffix in _READ}
    found = _names(folder)
    altered = [n for n in found if n in counted and n not in leave_out and file_digest(folder / n) != digests[n]]
    missing = sorted(counted - set(found))
    added = [n for n in found if n not in digests and Path(n).suffix in _READ] if content.get("closed", True) else []
    problems = [
        f"{', '.join(names)} {what}" for names, what in ((altered, "altered"), (missing, "missing"), (added, "added")) if names
    ]
    if problems:
        raise UserError(
            f"{folder} is not the checkpoint that was written: {'; '.join(problems)} (by the digests in {DIGESTS}). Take the "
            "run's own copy, or make it again. In Python, mgvq.load(..., verify=False) loads it as it is, on your own "
            "responsibility."
        )


def _names(folder: Path) -> list[str]:
    files = (f for f in folder.rglob("*") if f.is_file())
    return sorted(name for f in files if (name := f.relative_to(folder).as_posix()) != DIGESTS)
