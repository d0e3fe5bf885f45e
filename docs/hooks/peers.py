"""The page of peers: every preset with its paper, what is the same, what differs, what was chosen, and what it left of a model.

What the presets say comes from the comments of conf/method, figures from the records of the studies below.
"""

import csv
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from configuration import read
from pages import Page

STUDIES = {"e18_peers": "accuracy %", "e18_peers_lm": "perplexity"}  # and by what their arms are told
PARAGRAPH = re.compile(r"^(Settings|Deviations|Chosen|Fine-tuning): ")
PAPER = re.compile(r"\(([^()]* \d{4})\)")
INTRODUCTION = (
    "# Peers\n\nEvery published method that is a preset here: what it has of its paper, what differs, and what it leaves of "
    "two small models at 2.0 stored bits a weight, with the same calibration samples and without fine-tuning. Each had the same "
    "small budget to choose its settings (damping, order, refit), on held-out samples alone: `experiments/e18_peers/choose.py` "
    "and the `chosen.csv` beside it. Lengths of vectors are chosen by the bytes that their tables take. What the methods' own "
    "papers print: [Numbers](numbers.md). Tests hold each of them against a slow version of its published formulas "
    "(`tests/textbook.py`, `tests/oracle/test_peers_*.py`).\n"
)


@cache
def pages(root: Path) -> list[Page]:
    """The one page, generated."""
    presets = {file.stem: read(file).headline for file in sorted((root / "conf" / "method").glob("*.yaml"))}
    figures = {study: _figures(root, study) for study in STUDIES}
    published = {name: lines for name, lines in presets.items() if paper(lines)}
    parts = [INTRODUCTION, _table(presets, figures), *(_section(name, lines) for name, lines in published.items())]
    return [Page("peers.md", "Peers", "\n".join(parts))]


def paper(headline: list[str]) -> str:
    """The paper that a preset names first, `Frantar et al. 2023`; empty for what is ours, reconstructions of MGVQ too."""
    found = PAPER.search(paragraphs(headline)[""])
    return found[1] if found and not headline[0].startswith("MGVQ") else ""


def paragraphs(headline: list[str]) -> dict[str, str]:
    """The paragraphs of a preset's comment by their first word; the first of all under the empty one."""
    found, now = {"": ""}, ""
    for line in headline:
        if begun := PARAGRAPH.match(line):
            now, line = begun[1], line[begun.end() :]
        found[now] = f"{found.get(now, '')} {line}".strip()
    return found


def _figures(root: Path, study: str) -> dict[str, dict[str, str]]:
    """The row of every arm; none where the study has not been run."""
    file = root / "results" / "tables" / f"{study}.csv"
    if not file.is_file():
        return {}
    with file.open(encoding="utf-8", newline="") as lines:
        return {row["arm"]: row for row in csv.DictReader(lines)}


def _table(presets: Mapping[str, list[str]], figures: Mapping[str, dict[str, dict[str, str]]]) -> str:
    heads = [f"{study}: {measure} | bits | seconds" for study, measure in STUDIES.items()]
    rows = [f"| preset | paper | {' | '.join(heads)} |", f"|---|---|{'---:|' * 3 * len(STUDIES)}"]
    for name, lines in presets.items():
        cells = [cell for study, measure in STUDIES.items() for cell in _cells(figures[study].get(_arm(name)), measure)]
        title = f"[`{name}`](#{name})" if paper(lines) else f"`{name}`"
        rows.append(f"| {title} | {paper(lines) or '-'} | {' | '.join(cells)} |")
    missing = [study for study in STUDIES if not figures[study]]
    note = f"\n\nNot run here yet: {', '.join(missing)}." if missing else ""
    return (
        "\n".join(rows)
        + f"\n\nSeconds are those of quantising on one thread, calibration apart; a dash: no arm of the study.{note}\n"
    )


def _arm(preset: str) -> str:
    return preset.replace("full_precision", "full precision")


def _cells(row: Mapping[str, str] | None, measure: str) -> list[str]:
    if row is None:
        return ["-", "-", "-"]
    score = float(row[measure]) if row[measure] else None
    shown = "not finite" if score is None else f"{score:,.0f}" if score >= 1000 else f"{score:.1f}"
    return [shown, f"{float(row['bits, layers']):.3f}", f"{float(row['quantise s']):.0f}"]


def _section(name: str, headline: list[str]) -> str:
    parts = paragraphs(headline)
    lines = [
        f"## {name} {{#{name}}}",
        _safe(parts[""]),
        f"[Its groups](configuration/method.md#{name})",
    ]
    words = {
        "Settings": "The same",
        "Deviations": "What differs",
        "Chosen": "Chosen on held-out samples",
        "Fine-tuning": "Fine-tuning",
    }
    lines += [f"**{title}**: {_safe(parts[key])}" for key, title in words.items() if key in parts]
    return "\n\n".join(lines) + "\n"


def _safe(text: str) -> str:
    return text.replace("<", "&lt;")
