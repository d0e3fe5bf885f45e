"""Under which terms a model may be used, as its folder says: they hold for what is made of it too."""

from pathlib import Path

import yaml

_NAMES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")


def licence_of(folder: Path) -> str | None:
    """What the model card of a folder names as its `license`; None where it names none, or there is no card."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return None
    try:
        said = yaml.safe_load(text[4:].split("\n---")[0])
    except yaml.YAMLError:
        return None
    licence = said.get("license_name") or said.get("license") if isinstance(said, dict) else None
    return str(licence) if licence else None


def term_files(folder: Path) -> tuple[Path, ...]:
    """The files of a folder that have the terms themselves."""
    return tuple(sorted(f for f in folder.iterdir() if f.is_file() and f.name.upper().startswith(_NAMES)))
