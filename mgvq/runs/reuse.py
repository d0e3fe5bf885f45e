"""Another evaluation of a model that a finished run has quantised: its checkpoint is taken over, not made again."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgvq.errors import UserError
from mgvq.runs.store import RunFolder

QUANTIZATION = "quantization.json"  # what metrics.json says of the checkpoint: rate, flags, sizes, seconds
TABLES = ("layers", "proxy", "allocation", "channels", "blocks", "tuning", "ledger")
log = logging.getLogger(__name__)


def find_quantised(folder: RunFolder, identity: Mapping[str, Any]) -> RunFolder | None:
    """A finished run beside `folder` whose settings are `identity` but for the evaluation, and whose files are all its own."""
    wanted = _without_evaluation(json.loads(json.dumps(identity)))
    for done in sorted(folder.path.parent.glob("*/DONE")):
        other = RunFolder(done.parent)
        try:
            if other.path == folder.path or _without_evaluation(json.loads(_read(other, "identity.json"))) != wanted:
                continue
            json.loads(_read(other, QUANTIZATION))
            other.verify()
        except UserError as error:
            log.warning("its checkpoint is not taken over: %s", error)
        except (OSError, ValueError, TypeError):  # a run of an older version, or damaged: whoever reads its numbers is told
            continue
        else:
            return other
    return None


def take_over(other: RunFolder, folder: RunFolder) -> dict[str, Any]:
    """Put the other run's checkpoint (without copying bytes where the disk can) and its tables into `folder`.

    Returns what `quantization.json` says of them.
    """
    shutil.copytree(other.checkpoint, folder.checkpoint, copy_function=_link)
    for name in [QUANTIZATION, *(f"{table}.parquet" for table in TABLES)]:
        if (other.path / name).is_file():
            shutil.copyfile(other.path / name, folder.path / name)
    return json.loads(_read(folder, QUANTIZATION))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _read(run: RunFolder, name: str) -> str:
    return Path(run.path / name).read_text(encoding="utf-8")


def _without_evaluation(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if name != "evaluation"}
