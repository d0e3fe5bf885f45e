"""Files that are built from records: tables, and the tables inside README.md."""

import re
from pathlib import Path

import pandas as pd

from mgvq.analysis.table import markdown


def write_tables(name: str, records: pd.DataFrame, results: Path) -> Path:
    """`tables/NAME.md` under `results`; equal records give equal bytes."""
    path = results / "tables" / f"{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown(records))
    return path


def with_tables(text: str, tables: Path) -> str:
    """`text` with what stands between `<!-- table NAME -->` and `<!-- end -->` replaced by that table, if there is one."""

    def current(match: re.Match[str]) -> str:
        table = tables / f"{match[2]}.md"
        return f"{match[1]}\n{table.read_text()}{match[3]}" if table.is_file() else match[0]

    return re.sub(r"(<!-- table (\w+) -->)\n.*?(<!-- end -->)", current, text, flags=re.DOTALL)
