"""A study as one HTML file that needs neither a server nor the network: question, verdict, tables, figures, examples, runs."""

import base64
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from mgvq.analysis.examples import RULE, examples
from mgvq.analysis.records.records import Cell, StudyRecord
from mgvq.analysis.report import FIGURES, figure_path
from mgvq.analysis.tables.arms import arms_table
from mgvq.analysis.tables.missing import told_missing
from mgvq.analysis.tables.render import MISSING, PLUS_MINUS
from mgvq.analysis.tables.table import Row, rows
from mgvq.analysis.verdict import verdict
from mgvq.studies.spec import Study


def write_html(name: str, study: Study, record: StudyRecord, results: Path) -> Path:
    """Write `reports/NAME/index.html` under `results`; the figures of `write_figures` go into it.

    Links to run folders are relative, and there only where the folders are. Equal inputs give equal bytes.
    """
    path = results / "reports" / name / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = template("report.html.j2").render(
        study=study,
        warning=told_missing(record),
        verdict=[sentence for sentence in verdict(record) if sentence != told_missing(record)],
        tables=[_table(record), *(_table(record.against(other)) for other in record.baselines[1:])],
        figures=figures_of(name, results),
        by_type=_by_type(record),
        examples={point: found for point, found in examples(record, results / "runs").items() if found},
        rule=RULE,
        rows=[_runs(row, results, path.parent) for row in rows(record)],
    )
    path.write_text(text, encoding="utf-8")
    return path


def template(name: str) -> Template:
    """A template of a page, in which all data are escaped."""
    return Environment(
        loader=PackageLoader("mgvq.analysis"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template(name)


def _table(record: StudyRecord) -> dict[str, Any]:
    table = arms_table(record)
    lines = [
        [{"text": cell.replace(PLUS_MINUS, "\N{PLUS-MINUS SIGN}"), "best": (i, j) in table.bold} for j, cell in enumerate(line)]
        for i, line in enumerate(table.lines)
    ]
    title = f"Every arm against {record.baseline}" if record.baseline else "Every arm"
    return {"title": title, "header": table.header, "lines": lines, "note": table.note}


def figures_of(name: str, results: Path) -> list[dict[str, str]]:
    """The figures that a study has, by name, as images with their captions."""
    return [
        {"name": figure.name, "uri": _svg(file), "caption": figure.caption}
        for figure in FIGURES
        if (file := figure_path(results, name, figure)).is_file()
    ]


def _svg(file: Path) -> str:
    """The figure as an image of its own, whose names do not meet those of the other figures in the page."""
    return f"data:image/svg+xml;base64,{base64.b64encode(file.read_bytes()).decode()}"


def _by_type(record: StudyRecord) -> list[dict[str, Any]]:
    """A table a grid point: arms by question types, accuracy in percent, the mean over runs. Types of the headline first.

    Empty where the headline is not made of types: a benchmark's table has its tasks, prose no types.
    """
    headline = record.kind.headline_types
    if not headline:
        return []
    asked = record.questions.type.value_counts()
    types = [name for name in headline if name in asked] + sorted(set(asked.index) - set(headline))
    heads = [(name, name in headline, int(asked[name])) for name in types]
    return [
        {
            "title": point.title() or "all runs",
            "types": heads,
            "lines": [
                {"arm": arm, "values": [_share(cell, f"{record.kind.headline}/{name}") for name in types]}
                for arm, cell in record.at(point).items()
            ],
        }
        for point in record.points
    ]


def _share(cell: Cell, metric: str) -> dict[str, Any]:
    """The mean of a share over the runs, as text and as a number between 0 and 1 that colours the cell."""
    found = [run.metric(metric) for run in cell.runs]
    value = sum(found) / len(found) if found else math.nan
    return {"text": MISSING, "share": 1} if math.isnan(value) else {"text": f"{100 * value:.0f}", "share": round(value, 2)}


def _runs(row: Row, results: Path, here: Path) -> dict[str, Any]:
    """What a line of the table is made of: run ids, whether their folders are here, and the command of each."""
    folders: Sequence[Path] = [results / "runs" / name for name in row.runs]
    links = [
        {"id": folder.name, "href": os.path.relpath(folder, here) if folder.is_dir() else None, "command": command}
        for folder, command in zip(folders, row.commands, strict=True)
    ]
    return {"point": row.point.words, "arm": row.arm, "links": links, "flags": row.flags}
