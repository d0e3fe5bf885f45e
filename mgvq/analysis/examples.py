"""Test questions that show what quantisation does: images with the answers of full precision and of every arm."""

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from mgvq.analysis.records.records import Cell, StudyRecord, read_parquet
from mgvq.errors import UserError
from mgvq.runs.store import RunFolder

NUM_EXAMPLES = 6
Redraw = Callable[[Mapping[str, Any]], np.ndarray | None]
RULE = (
    "Chosen by rule: at the study's first seed, the first question of each type that full precision answers rightly and on "
    f"which the arms differ, {NUM_EXAMPLES} at most; without a full-precision arm, those on which the arms differ."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What some arms answered."""

    text: str
    """The words of the answer."""
    is_right: bool
    """Whether the answer is right."""
    arms: list[str]
    """The arms that gave it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A question about an image and the answers to it."""

    image: str
    """The image, PNG as a data URI."""
    question: str
    """The question."""
    answer: str
    """The right answer."""
    type: str
    """The type of the question."""
    answers: list[Answer]
    """The different answers, right ones first, then those that most arms gave."""


def examples(record: StudyRecord, runs: Path) -> dict[str, list[Example]]:
    """Examples by the grid point's title, chosen as `RULE` says.

    Empty where run folders are not here, or the evaluation's images cannot be drawn again. Raises UserError where an image is
    no longer the one that the runs saw, or where samples are not those that a run wrote.
    """
    if record.kind.redraw is None:
        return {}
    redraw = _function(record.kind.redraw)
    seed = record.runs[0].seeds[0]
    found = {}
    for point in record.points:
        folders = {cell.arm: runs / run.run for cell in record.at(point).values() for run in cell.runs if seed in run.seeds}
        if not folders or not all((folder / "samples.parquet").is_file() for folder in folders.values()):
            return {}
        found[point.title() or "all runs"] = _of_point(record.at(point), folders, redraw)
    return found


def _function(path: str) -> Redraw:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _of_point(cells: Mapping[str, Cell], folders: Mapping[str, Path], redraw: Redraw) -> list[Example]:
    samples = {arm: _samples(folder) for arm, folder in folders.items()}
    full = [arm for arm in samples if cells[arm].is_full_precision]
    right = pd.DataFrame({arm: frame.score > 0 for arm, frame in samples.items()})
    others = right.drop(columns=full)
    wanted = others.any(axis=1) & ~others.all(axis=1) & right[full].all(axis=1)
    asked = next(iter(samples.values()))
    chosen = asked.loc[wanted].drop_duplicates("type").head(NUM_EXAMPLES)
    return [
        Example(
            image=_image(row, redraw),
            question=row["question"].strip(),
            answer=row["answer"],
            type=row["type"],
            answers=_answers({arm: (frame.prediction[i], bool(right.loc[i, arm])) for arm, frame in samples.items()}),
        )
        for i, row in chosen.to_dict(orient="index").items()
    ]


def _samples(folder: Path) -> pd.DataFrame:
    RunFolder(folder).verify("samples.parquet")
    return read_parquet(folder / "samples.parquet", "delete the run's folder and run it again.")


def _answers(by_arm: Mapping[str, tuple[str, bool]]) -> list[Answer]:
    arms: dict[tuple[str, bool], list[str]] = {}
    for arm, answer in by_arm.items():
        arms.setdefault(answer, []).append(arm)
    found = [Answer(text=text, is_right=is_right, arms=who) for (text, is_right), who in arms.items()]
    return sorted(found, key=lambda answer: (not answer.is_right, -len(answer.arms)))


def _image(row: Mapping[str, Any], redraw: Redraw) -> str:
    pixels = redraw(row)
    if pixels is None:
        raise UserError(f"question {row['sample_id']} is about another image than when the run was made; run the study again.")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
