"""Calibration on a data set of the hub, or in a local folder, through the library `datasets`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mgvq.calibration.drawn import Drawn
from mgvq.calibration.rows import Row, chat_turns, open_image, question_turns
from mgvq.checks import is_commit, told_as
from mgvq.data.cached import cache_of
from mgvq.errors import UserError
from mgvq.model.chat import Turn

_COLUMNS = ("images", "question", "answer", "messages")
_SAVED = ("state.json", "dataset_dict.json")  # of a data set, and of several splits, in a folder of `save_to_disk`


@dataclass(frozen=True, kw_only=True)
class Hub(Drawn):
    """`path`: `organisation/name` with its commit as `revision`, or a folder: of `save_to_disk`, or that `load_dataset` reads.

    `columns` says which column is what: `answer` with or without `question` and `images` (one, or a list), of several answers the
    first; or `messages` with or without `images`, as `rows.chat_turns` reads them.
    """

    subset: str | None
    split: str | None
    revision: str | None
    columns: dict[str, str | None]

    def __post_init__(self) -> None:
        super().__post_init__()
        named = {key for key, column in self.columns.items() if column is not None}
        if unknown := sorted(set(self.columns) - set(_COLUMNS)):
            raise UserError(f"calibration.columns has no {', '.join(unknown)}; there are {', '.join(_COLUMNS)}.")
        if not ({"messages"} <= named <= {"messages", "images"} or {"answer"} <= named <= {"answer", "question", "images"}):
            raise UserError(
                f"calibration.columns names {', '.join(sorted(named)) or 'none'}: give calibration.columns.answer=COLUMN, and "
                "question and images where there are any, or calibration.columns.messages=COLUMN, and images."
            )
        for key, idle in (("revision", Path(self.path).is_dir()), ("subset", self._is_saved())):
            if idle and (value := getattr(self, key)) is not None:
                raise UserError(f"calibration.{key}={value} has no effect with the folder {self.path}; leave it out.")
        if not Path(self.path).is_dir() and not is_commit(self.revision):
            raise UserError(
                f"calibration.path={self.path} is not a folder, so it is taken as a name on the hub, and that needs "
                f"calibration.revision=<the 40 hex digits of a commit>, got {self.revision!r}: a branch may change."
            )

    def rows(self) -> Sequence[Row]:
        """Raises UserError too where the data set cannot be had, or a column is not there."""
        data = self._load()
        columns = [column for column in self.columns.values() if column is not None]
        if missing := sorted(set(columns) - set(data.column_names)):
            raise UserError(
                f"{self.path}: calibration.columns names {', '.join(missing)}; there are {', '.join(data.column_names)}."
            )
        data = data.select_columns(columns)
        return [Row(self.path, f"split {self.split}, row {i}", partial(data.__getitem__, i)) for i in range(len(data))]

    def turns(self, row: Row) -> tuple[Turn, ...]:
        content = row.content()
        found = {key: content[column] for key, column in self.columns.items() if column is not None}
        images = found.get("images")
        images = images if isinstance(images, list) else [] if images is None else [images]
        if "messages" in found:
            return chat_turns(row, found["messages"], images, Path(self.path))
        images = [open_image(row, image, Path(self.path)) for image in images]
        return question_turns(row, images, found.get("question"), found["answer"])

    def _load(self) -> Any:
        import datasets  # here: it takes a second
        from datasets.config import HF_DATASETS_CACHE

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        splits: dict[Any, Any]
        what = f"calibration.path={self.path} (subset {self.subset}, split {self.split}) cannot be loaded"
        advice = (
            "A hub name needs the network once, or its files in the local cache; a folder needs nothing. What it is read into is "
            f"{HF_DATASETS_CACHE}, which must be writable: HF_HOME says where that is."
        )
        with told_as(what, advice):
            if self._is_saved():
                data = datasets.load_from_disk(self.path)
                splits = data if isinstance(data, datasets.DatasetDict) else {None: data}
            else:
                cache = cache_of(Path(self.path)) if Path(self.path).is_dir() else None
                data = datasets.load_dataset(self.path, self.subset, split=self.split, revision=self.revision, cache_dir=cache)
                splits = data if isinstance(data, datasets.DatasetDict) else {self.split: data}
        if self.split not in splits:
            named = ", ".join("null (no splits)" if name is None else str(name) for name in splits)
            raise UserError(f"calibration.split={self.split}: in {self.path} there is {named}.")
        return splits[self.split]

    def _is_saved(self) -> bool:
        return any((Path(self.path) / name).is_file() for name in _SAVED)
