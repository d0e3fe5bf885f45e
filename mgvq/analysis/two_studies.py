"""Two studies on one HTML page: in what the files differ, verdicts and figures side by side, and the arms of both."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from mgvq.analysis.html import figures_of, template
from mgvq.analysis.records.records import StudyRecord
from mgvq.analysis.tables.render import MISSING
from mgvq.analysis.tables.table import Row, columns_of, rows
from mgvq.analysis.verdict import verdict
from mgvq.studies.spec import Study


def write_two(first: tuple[Study, StudyRecord], second: tuple[Study, StudyRecord], results: Path) -> Path:
    """Write `reports/A_and_B/index.html` under `results`, from two records; the figures of their reports go into it.

    Arms are matched by name and grid point. The page tests nothing: the two studies were not planned together. Equal inputs give
    equal bytes.
    """
    studies, records = (first[0], second[0]), (first[1], second[1])
    path = results / "reports" / f"{studies[0].name}_and_{studies[1].name}" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    header, lines = shared_arms(*records)
    text = template("two_studies.html.j2").render(
        studies=studies,
        verdicts=[verdict(record) for record in records],
        settings=file_differences(*studies),
        same_questions=len({run.samples for record in records for run in record.runs}) == 1,
        header=header,
        lines=lines,
        figures=_side_by_side(studies, results),
    )
    path.write_text(text, encoding="utf-8")
    return path


def file_differences(a: Study, b: Study) -> list[list[str]]:
    """Key and both values of all in which the study files differ, name and question apart."""
    keys = [field.name for field in fields(Study) if field.name not in ("name", "question")]
    values = [(key, getattr(a, key), getattr(b, key)) for key in keys]
    return [[key, json.dumps(own), json.dumps(other)] for key, own, other in values if own != other]


def shared_arms(a: StudyRecord, b: StudyRecord) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the arms that both have at the same point: every metric of both, and the second minus the first."""
    columns = {name: column for name, column in columns_of(a).items() if name in columns_of(b)}
    others = {(row.point, row.arm): row for row in rows(b)}
    header = ["point", "arm", *(f"{name}{mark}" for name in columns for mark in (", A", ", B", ", B - A"))]
    lines = []
    for row in rows(a):
        if (other := others.get((row.point, row.arm))) is not None:
            cells = [cell for name, column in columns.items() for cell in _cells(row, other, name, column.decimals)]
            lines.append([row.point.words, row.arm, *cells])
    return header, lines


def _cells(row: Row, other: Row, name: str, decimals: int) -> list[str]:
    first, second = row.mean(name), other.mean(name)
    shown = [f"{first:.{decimals}f}", f"{second:.{decimals}f}", f"{second - first:+.{decimals}f}"]
    return [MISSING if math.isnan(value) else text for value, text in zip((first, second, second - first), shown, strict=True)]


def _side_by_side(studies: tuple[Study, Study], results: Path) -> list[dict[str, Any]]:
    """The figures by name, of each study its own or None."""
    found = [{figure["name"]: figure for figure in figures_of(study.name, results)} for study in studies]
    return [{"caption": (found[0] | found[1])[n]["caption"], "pair": [own.get(n) for own in found]} for n in found[0] | found[1]]
