"""English prose that comes with every Python: the language reference for tests, the standard library's docstrings to calibrate.

Both are part of the installation (`pydoc_data`, the modules themselves), so that nothing is fetched. Their words differ a
little between patch releases of Python; `Corpus.sha256` tells which ones a run has seen.
"""

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

WORDS = 160  # of a passage, about
_LEAST = 8  # words of a paragraph


@dataclass(frozen=True)
class Corpus:
    """Passages of about `WORDS` words by name, `DOCUMENT-NUMBER`: whole documents cut into equal runs of words."""

    passages: Mapping[str, str]

    @property
    def sha256(self) -> str:
        """Over names and texts."""
        return hashlib.sha256("".join(f"{name}\n{text}\n" for name, text in self.passages.items()).encode()).hexdigest()


@cache
def language_reference() -> Corpus:
    """The reference by topic, for test questions. A paragraph that several topics have is the shortest one's alone."""
    return cut(_reference())


@cache
def docstrings() -> Corpus:
    """The docstrings of the standard library's modules, for calibration; no paragraph is in the language reference too."""
    taken = {paragraph for paragraphs in _reference().values() for paragraph in paragraphs}
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return cut(_distinct(((file.stem, _docstrings_of(file)) for file in files), taken))


@cache
def _reference() -> dict[str, list[str]]:
    return _distinct(sorted(topics.items(), key=lambda topic: (len(topic[1]), topic[0])), set())


def _docstrings_of(file: Path) -> str:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = ast.walk(ast.parse(file.read_bytes()))
    return "\n\n".join(ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds))


def _distinct(documents: Iterable[tuple[str, str]], taken: set[str]) -> dict[str, list[str]]:
    """The paragraphs of prose of each document that neither it nor one before it, nor `taken`, has had; by name."""
    found: dict[str, list[str]] = {}
    for name, text in documents:
        for paragraph in (" ".join(part.split()) for part in re.split(r"\n\s*\n", text)):
            if paragraph not in taken and _is_prose(paragraph):
                taken.add(paragraph)
                found.setdefault(name, []).append(paragraph)
    return found


def _is_prose(paragraph: str) -> bool:
    """Begins and ends like a sentence, has some words, and hardly anything but words: no code, grammar or table."""
    plain = sum(c.isalpha() or c in " ,.'" for c in paragraph)
    like_a_sentence = re.match(r'["*(]?[A-Z]', paragraph) and paragraph[-1] in ".:)"
    return bool(like_a_sentence) and len(paragraph.split()) >= _LEAST and plain >= 0.9 * len(paragraph)


def cut(documents: Mapping[str, Sequence[str]]) -> Corpus:
    """The paragraphs of each document as passages of about `WORDS` words; documents of less than half of one are left out."""
    passages = {}
    for name, paragraphs in sorted(documents.items()):
        words = " ".join(paragraphs).split()
        number = round(len(words) / WORDS)
        for i in range(number):
            passages[f"{name}-{i}"] = " ".join(words[i * len(words) // number : (i + 1) * len(words) // number])
    return Corpus(passages)
