"""Calibration on local data: a JSON-lines file with rows `{"image": path, "question": text, "answer": text}`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mgvq.calibration.drawn import Drawn
from mgvq.calibration.rows import Row, json_lines, open_image, question_turns
from mgvq.model.chat import Turn


@dataclass(frozen=True, kw_only=True)
class ImageText(Drawn):
    """One question about one image a row; image paths are relative to the file."""

    def rows(self) -> Sequence[Row]:
        return json_lines(self.path)

    def turns(self, row: Row) -> tuple[Turn, ...]:
        content = row.content("image", "question", "answer")
        image = open_image(row, content["image"], Path(self.path).parent)
        return question_turns(row, [image], content["question"], content["answer"])
