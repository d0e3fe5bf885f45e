"""Files that are built from records: tables, and the tables inside README.md."""

import re
from pathlib import Path

import pandas as pd

from mgvq.analysis.records import against
from mgvq.analysis.render import latex, markdown, plain


def write_tables(name: str, records: pd.DataFrame, results: Path) -> list[Path]:
    """`tables/NAME.md`, `.csv` and `.tex` under `results`, and `NAME_vs_ARM` for every further baseline; the Markdown files.

    Equal records give equal bytes.
    """
    tables = {name: records}
    for baseline in records.attrs.get("baselines", [])[1:]:
        tables[f"{name}_vs_{re.sub('[^a-z0-9]+', '_', baseline.lower())}"] = against(records, baseline)
    folder = results / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    for table, rows in tables.items():
        for suffix, render in ((".md", markdown), (".csv", plain), (".tex", latex)):
            (folder / f"{table}{suffix}").write_text(render(rows))
    return [folder / f"{table}.md" for table in tables]


def with_tables(text: str, tables: Path) -> str:
    """`text` with what stands between `<!-- table NAME -->` and `<!-- end -->` replaced by that table, if there is one."""

    def current(match: re.Match[str]) -> str:
        table = tables / f"{match[2]}.md"
        return f"{match[1]}\n{table.read_text()}{match[3]}" if table.is_file() else match[0]

    return re.sub(r"(<!-- table (\w+) -->)\n.*?(<!-- end -->)", current, text, flags=re.DOTALL)
