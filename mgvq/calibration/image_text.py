"""Calibration on local data: a JSON-lines file with rows `{"image": path, "question": text, "answer": text}`."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from mgvq.calibration.examples import ExampleSet
from mgvq.errors import UserError
from mgvq.model.encode import Example
from mgvq.rng import generator

_FIELDS = ("image", "question", "answer")


@dataclass(frozen=True, kw_only=True)
class ImageText:
    """`num_samples` rows drawn without replacement, then `heldout_samples` more. Image paths are relative to the file.

    `label_seed` draws the answers that are sampled from the model for its Fisher.
    """

    path: str
    num_samples: int
    heldout_samples: int
    seed: int
    label_seed: int

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.heldout_samples < 0:
            raise UserError(
                f"calibration needs num_samples >= 1 and heldout_samples >= 0, got {self.num_samples} and {self.heldout_samples}"
            )

    def draw(self) -> ExampleSet:
        """Raises UserError, with file and line, for a missing file, a bad row, an unreadable image, or too few rows."""
        file = Path(self.path)
        if not file.is_file():
            raise UserError(f"calibration.path={self.path} is not a file; give a .jsonl with rows of {', '.join(_FIELDS)}.")
        try:
            lines = enumerate(file.read_text().splitlines(), start=1)
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not a text file ({error}); give JSON lines.") from error
        rows = [(number, line) for number, line in lines if line.strip()]
        wanted = self.num_samples + self.heldout_samples
        if len(rows) < wanted:
            raise UserError(
                f"{file} has {len(rows)} rows, but calibration.num_samples + heldout_samples asks for {wanted}: "
                "an empty or short set cannot calibrate. Lower the two numbers or add rows."
            )
        order = torch.randperm(len(rows), generator=generator(self.seed, "calibration"))[:wanted].tolist()
        examples = [_example(file, *rows[index]) for index in order]
        return ExampleSet(examples[: self.num_samples], examples[self.num_samples :], self.label_seed)


def _example(file: Path, number: int, line: str) -> Example:
    place = f"{file}, line {number}"
    try:
        row = json.loads(line)
        image, question, answer = (row[f] for f in _FIELDS)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{place}: needs a JSON object with {', '.join(_FIELDS)}; {type(error).__name__}: {error}") from error
    if not all(isinstance(value, str) for value in (image, question, answer)):
        raise UserError(f"{place}: {', '.join(_FIELDS)} must be texts, got {[image, question, answer]}")
    path = file.parent / image
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{place}: {path} cannot be read as an image ({error}). Fix the path or the file.") from error
    return Example(f"{file.name}-{number}", picture, question, answer)
