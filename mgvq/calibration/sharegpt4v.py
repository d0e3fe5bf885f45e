"""Calibration on images with ShareGPT4V's captions (Chen et al. 2023, arXiv 2311.12793), in the published JSON."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgvq.calibration.drawn import Drawn
from mgvq.calibration.rows import Row, chat_turns, read_text
from mgvq.errors import UserError
from mgvq.model.chat import Turn

_BEFORE_ENTRY = re.compile(r"\s*[\[,]\s*")


@dataclass(frozen=True, kw_only=True)
class ShareGPT4V(Drawn):
    """The entries of the list in `path` whose image begins with `prefix`; what follows it lies in the folder `images`."""

    images: str
    prefix: str

    def rows(self) -> Sequence[Row]:
        """Raises UserError too for a folder that is not there, and where no entry has such an image."""
        if not Path(self.images).is_dir():
            raise UserError(f"calibration.images={self.images} is not a folder; give the one that {self.prefix!r} stands for.")
        entries = _entries(self.path)
        names = [_image_name(row.read()) for row in entries]
        rows = [row for row, name in zip(entries, names, strict=True) if name and name.startswith(self.prefix)]
        if entries and not rows:
            raise UserError(
                f"{self.path}: of its {len(entries)} entries no image begins with calibration.prefix={self.prefix!r}; the first "
                f"is {names[0]!r}."
            )
        return rows

    def turns(self, row: Row) -> tuple[Turn, ...]:
        content = row.content("image", "conversations")
        return chat_turns(row, content["conversations"], [content["image"].removeprefix(self.prefix)], Path(self.images))


def _image_name(entry: Any) -> str:
    name = entry.get("image") if isinstance(entry, dict) else None
    return name if isinstance(name, str) else ""


def _entries(path: str) -> list[Row]:
    """The entries of a JSON list, with their lines. Raises UserError where `path` holds no such list."""
    text, decoder, rows = read_text(path), json.JSONDecoder(), []
    at, line = 0, 1
    while gap := _BEFORE_ENTRY.match(text, at):
        line += text.count("\n", at, gap.end())
        try:
            entry, at = decoder.raw_decode(text, gap.end())
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}: {error.msg}. It must be the published JSON list, whole.") from error
        except RecursionError as error:
            raise UserError(f"{path}, line {line}: brackets within brackets without end. Take the entry out.") from error
        rows.append(Row(path, f"entry {len(rows) + 1} (line {line})", lambda entry=entry: entry))
        line += text.count("\n", gap.end(), at)
    if text[at:].strip() != "]":
        raise UserError(f"{path}, line {line}: expected a JSON list of entries, got {text[at : at + 40]!r}.")
    return rows
