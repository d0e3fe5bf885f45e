"""A study as one HTML file that needs neither a server nor the network: question, verdict, tables, figures, examples, runs."""

import base64
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from mgvq.analysis.examples import RULE, examples
from mgvq.analysis.records.records import against, questions
from mgvq.analysis.report import FIGURES, figure_path
from mgvq.analysis.statistics.verdict import place, verdict
from mgvq.analysis.tables.render import note, printable
from mgvq.analysis.tables.table import Row, rows
from mgvq.data.tiny_vqa.questions import HEADLINE
from mgvq.studies.spec import Study

_BY_TYPE = "tiny_vqa/accuracy/"


def write_html(study: Study, records: pd.DataFrame, results: Path) -> Path:
    """`reports/STUDY/index.html` under `results`; the figures of `write_figures` go into it.

    Links to run folders are relative, and there only where the folders are. Equal inputs give equal bytes.
    """
    path = results / "reports" / study.name / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = Environment(
        loader=PackageLoader("mgvq.analysis"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    baselines = records.attrs.get("baselines") or []
    text = environment.get_template("report.html.j2").render(
        study=study,
        verdict=verdict(records),
        tables=[_table(records), *(_table(against(records, other)) for other in baselines[1:])],
        figures=[
            {"uri": _svg(file), "caption": caption}
            for kind, caption in FIGURES.items()
            if (file := figure_path(results, study.name, kind)).is_file()
        ],
        by_type=_by_type(records),
        examples={_name(point): found for point, found in examples(records, results / "runs").items() if found},
        rule=RULE,
        rows=[_runs(row, results, path.parent) for row in rows(records)],
    )
    path.write_text(text)
    return path


def _name(point: str) -> str:
    return ", ".join(map(str, json.loads(point).values())) or "all runs"


def _table(records: pd.DataFrame) -> dict[str, Any]:
    header, *lines = printable(records)
    against = records.attrs.get("baseline")
    title = f"Every arm against {against}" if against else "Every arm"
    return {"title": title, "header": header, "lines": [list(map(_cell, line)) for line in lines], "note": note(records)}


def _cell(text: str) -> dict[str, Any]:
    return {"text": text.strip("*").replace("+-", "\N{PLUS-MINUS SIGN}"), "best": text.startswith("**")}


def _svg(file: Path) -> str:
    """As an image, whose names do not meet those of the other pictures in the page."""
    return f"data:image/svg+xml;base64,{base64.b64encode(file.read_bytes()).decode()}"


def _by_type(records: pd.DataFrame) -> list[dict[str, Any]]:
    """A table a grid point: arms by question types, accuracy in percent, the mean over runs. Types of the headline first.

    None where the questions were others: a benchmark's table has its tasks, text no types.
    """
    if not any(name.startswith(_BY_TYPE) for name in json.loads(records.metrics.iloc[0])):
        return []
    asked = questions(records).type.value_counts()
    types = [kind for kind in HEADLINE if kind in asked] + sorted(set(asked.index) - set(HEADLINE))
    tables = []
    for point, part in records.groupby("point", sort=False):
        lines = []
        for arm, mine in part.groupby("arm", sort=False):
            found = [json.loads(text) for text in mine.metrics]
            values = [sum(m[_BY_TYPE + kind] for m in found) / len(found) for kind in types]
            lines.append({"arm": arm, "values": [{"text": f"{100 * v:.0f}", "share": round(v, 2)} for v in values]})
        tables.append({"title": _name(str(point)), "lines": lines})
    return [{**table, "types": [(kind, kind in HEADLINE, int(asked[kind])) for kind in types]} for table in tables]


def _runs(row: Row, results: Path, here: Path) -> dict[str, Any]:
    """What a line of the table is made of: run ids, whether their folders are here, and the command of each."""
    folders = [results / "runs" / name for name in row.runs]
    links = [
        {"id": folder.name, "href": os.path.relpath(folder, here) if folder.is_dir() else None, "command": command}
        for folder, command in zip(folders, row.commands, strict=True)
    ]
    return {"point": place(row), "arm": row.arm, "links": links, "flags": row.flags}
