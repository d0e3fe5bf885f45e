"""Texts of the user's own: a file, a folder of files, or a data set of the hub, as documents by name.

`TextSettings` is what `calibration=text` and `evaluation=perplexity` have in common: where the text comes from, and whether it is
read in passages of some 160 words or in windows of tokens, as the literature does.
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mgvq.checks import is_commit, told_as, whole_number
from mgvq.data.english import Corpus, cut
from mgvq.digest import file_digest
from mgvq.errors import UserError

SUFFIXES = (".md", ".rst", ".txt")  # the files of a folder that are read


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Where a text comes from and how it is cut."""

    path: str | None = (
        None  # a file or folder of texts in UTF-8, or organisation/name on the hub; None: the text that is built in
    )
    revision: str | None = None  # of a hub name: the 40 hex digits of its commit
    subset: str | None = None  # of a hub name: the configuration of the data set, where it has several
    split: str | None = None  # of a hub name: train, validation, test ...
    column: str | None = None  # of a hub name: the column of the text
    window: int | None = None  # tokens of a window; None: passages of about 160 words
    stride: int | None = None  # tokens from one window to the next; None: as long as the window

    def check_settings(self, group: str) -> None:
        """Raises UserError for settings that make no sense together; `group` is what they are settings of."""
        if self.window is None and self.stride is not None:
            raise UserError(f"{group}.stride={self.stride} has no effect without {group}.window=2048, say.")
        if self.window is not None:
            whole_number(f"{group}.window", self.window, least=2)
        if self.stride is not None:
            whole_number(f"{group}.stride", self.stride, least=1, most=self.window, why="A greater one would leave text out.")
        named = {name: getattr(self, name) for name in ("revision", "subset", "split", "column")}
        given = {name: value for name, value in named.items() if value is not None}
        if self.path is None or Path(self.path).exists():
            if given:
                name, value = next(iter(given.items()))
                where = "the text that is built in" if self.path is None else f"the local text {self.path}"
                raise UserError(f"{group}.{name}={value} has no effect with {where}; it is about a data set of the hub.")
        elif "/" not in self.path or self.path.startswith((".", "/", "~")):
            raise UserError(f"{group}.path={self.path} does not exist: give a text file in UTF-8, or a folder of {_suffixes()}.")
        elif not is_commit(self.revision):
            raise UserError(
                f"{group}.path={self.path} does not exist here, so it is taken as a data set on the hub, and that needs "
                f"{group}.revision=<the 40 hex digits of a commit>, got {self.revision!r}: a branch may change."
            )
        elif missing := [name for name in ("split", "column") if name not in given]:
            raise UserError(f"{group}.path={self.path} is a data set of the hub, and that needs {group}.{missing[0]}.")

    def documents(self, built_in: Corpus) -> Mapping[str, str]:
        """The texts by name, each read by itself. Raises UserError for what cannot be read, with its place."""
        if self.path is None:
            joined: dict[str, list[str]] = {}
            for name, passage in built_in.passages.items():
                joined.setdefault(name.rpartition("-")[0], []).append(passage)
            return {name: " ".join(parts) for name, parts in joined.items()}
        if Path(self.path).exists():
            return _local(self.path, _state(Path(self.path)))
        return _hub(self.path, self.revision, self.subset, self.split, self.column)

    def corpus(self, built_in: Corpus) -> Corpus:
        """The passages of about 160 words."""
        if self.path is None:
            return built_in
        return cut({name: [text] for name, text in self.documents(built_in).items()})

    def sha256(self, built_in: Corpus) -> str:
        """Of what is read, with names."""
        return built_in.sha256 if self.path is None else Corpus(self.documents(built_in)).sha256


def counted(path: str | None, _: Mapping[str, Any]) -> str | None:
    """How `path` counts in the identity of a run: by the files that are read, wherever they lie; a hub name as it is."""
    if path is None or not Path(path).exists():
        return path
    digest = hashlib.sha256()
    for file in _files(Path(path)):
        digest.update(f"{_name(file, Path(path))} {file_digest(file)}\n".encode())
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    inside = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    return [f for f in inside if not any(part.startswith(".") for part in f.relative_to(path).parts)]


def _name(file: Path, path: Path) -> str:
    return file.stem if file == path else file.relative_to(path).as_posix()


def _state(path: Path) -> tuple[tuple[str, int, int], ...]:
    """What changes with the files, so that they are read once as long as they stay as they are."""
    return tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in _files(path))


@lru_cache(maxsize=2)
def _local(path: str, state: Sequence[tuple[str, int, int]]) -> Mapping[str, str]:
    if not state:
        raise UserError(f"{path} holds no text: a folder is read for its {_suffixes()} files, and what is below it.")
    found = {}
    for name, *_ in state:
        file = Path(name)
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is no UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}.") from error
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}).") from error
        if text.strip():
            found[_name(file, Path(path))] = text
    if not found:
        raise UserError(f"{path} holds no text: every file is empty.")
    return found


@lru_cache(maxsize=2)
def _hub(path: str, revision: str | None, subset: str | None, split: str | None, column: str | None) -> Mapping[str, str]:
    """All rows as one document, joined by empty lines, as the literature reads wikitext."""
    import datasets  # here: it takes a second

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    what = f"{path} (subset {subset}, split {split}) cannot be loaded"
    with told_as(what, "A data set of the hub needs the network once, or its files in the local cache."):
        data: Any = datasets.load_dataset(path, subset, split=split, revision=revision)
    if column not in data.column_names:
        raise UserError(f"{path}: column={column}, and there are {', '.join(data.column_names)}.")
    rows = data[column]
    if not all(isinstance(row, str) for row in rows):
        raise UserError(f"{path}: the column {column} holds other things than texts.")
    return {path.rpartition("/")[2]: "\n\n".join(rows)}


def _suffixes() -> str:
    return f"{', '.join(SUFFIXES[:-1])} and {SUFFIXES[-1]}"
