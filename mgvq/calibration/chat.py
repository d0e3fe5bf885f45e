"""Calibration on conversations: a JSON-lines file with rows `{"messages": [{"role": .., "content": ..}, ..], "images": [..]}`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mgvq.calibration.drawn import Drawn
from mgvq.calibration.rows import Row, chat_turns, json_lines
from mgvq.model.chat import Turn


@dataclass(frozen=True, kw_only=True)
class ChatLines(Drawn):
    """Texts and images in any order and number, or one of them alone (`rows.chat_turns`); image paths are relative to the file.

    `images` may be left out where the messages name theirs, or show none.
    """

    def rows(self) -> Sequence[Row]:
        return json_lines(self.path)

    def turns(self, row: Row) -> tuple[Turn, ...]:
        content = row.content("messages")
        return chat_turns(row, content["messages"], content.get("images", []), Path(self.path).parent)
