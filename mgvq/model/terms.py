"""Under which terms a model may be used, as its folder says: they hold for what is made of it too."""

import re
import shutil
import tempfile
from pathlib import Path

import yaml

_NAMES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")


def licence_of(folder: Path) -> str | None:
    """What the model card of a folder names as its `license`; None where it names none, or there is no card."""
    return next(filter(None, map(_named, _cards(folder))), None)


def term_files(folder: Path) -> tuple[Path, ...]:
    """The files of a folder that have the terms themselves: `LICENSE`, `NOTICE.md`, `GEMMA_TERMS.html`, for example."""
    return tuple(sorted(f for f in folder.iterdir() if f.is_file() and _has_terms(f.name.upper())))


def bring_terms(origin: Path, folder: Path) -> None:
    """Copy the term files and model cards of one folder, if it is there, that another lacks; each whole or not at all."""
    for file in (*term_files(origin), *_cards(origin)) if origin.is_dir() else ():
        if not (folder / file.name).exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                Path(shutil.copyfile(file, Path(scratch) / file.name)).rename(folder / file.name)


def _has_terms(name: str) -> bool:
    return name.startswith(_NAMES) or "TERMS" in re.split("[^A-Z]+", name)


def _cards(folder: Path) -> list[Path]:
    """README.md before others, such as the README.upstream.md of a package that has a README of its own."""
    return [card for card in (folder / "README.md", *sorted(folder.glob("README.*.md"))) if card.is_file()]


def _named(card: Path) -> str | None:
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return None
    try:
        said = yaml.safe_load(text[4:].split("\n---")[0])
    except yaml.YAMLError:
        return None
    licence = said.get("license_name") or said.get("license") if isinstance(said, dict) else None
    return str(licence) if licence else None
