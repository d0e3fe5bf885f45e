"""Any table as Markdown, CSV and LaTeX: a file format is a line in `FORMATS`. Equal tables give equal text."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tabulate import tabulate

MISSING = "- !"  # what stands in a cell whose value is missing; the note of the table says which and why
PLUS_MINUS = "+-"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as they are printed, the same in every format."""

    header: Sequence[str]
    """The heading of every column."""
    lines: Sequence[Sequence[str]]
    """The cells of every line."""
    note: str
    """What the numbers are, in paragraphs; stands below the table."""
    csv: str = ""
    """The bare numbers as CSV, with more digits than the cells have."""
    warning: str = ""
    """What a reader has to know first, such as which runs are missing; stands above the table."""
    bold: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    """Line and column of the cells that are the best of their column."""

    def decorated(self, text: Callable[[str], str], bold: Callable[[str], str]) -> tuple[list[str], list[list[str]]]:
        """Header and cells in a format: `text` writes a cell, `bold` marks one that is written."""
        lines = [
            [bold(text(cell)) if (i, j) in self.bold else text(cell) for j, cell in enumerate(line)]
            for i, line in enumerate(self.lines)
        ]
        return list(map(text, self.header)), lines


def markdown(table: Table) -> str:
    """The table as GitHub's Markdown: the warning, the table, the note."""
    header, lines = table.decorated(escaped, lambda cell: f"**{cell}**")
    warning = f"**{escaped(table.warning)}**\n\n" if table.warning else ""
    return f"{warning}{tabulate(lines, header, 'pipe', disable_numparse=True)}\n\n{table.note}\n"


def escaped(text: str) -> str:
    """A cell that shows itself in Markdown: its bars, stars, backticks and tags mean nothing."""
    return re.sub(r"[|*`]|<(?=[A-Za-z/!])", lambda match: f"\\{match[0]}", text)


def latex(table: Table) -> str:
    """The table as a booktabs tabular, the warning and the note as comments above it."""
    header, lines = table.decorated(tex_cell, lambda cell: rf"\textbf{{{cell}}}")
    comments = [f"% {line}" for line in (*table.warning.splitlines(), *table.note.splitlines()) if line]
    written = [" & ".join(line) + r" \\" for line in (header, *lines)]
    tabular = [
        rf"\begin{{tabular}}{{{'l' * len(header)}}}",
        r"\toprule",
        written[0],
        r"\midrule",
        *written[1:],
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join([*comments, *tabular]) + "\n"


_TEX = {
    "_": r"\_",
    "%": r"\%",
    "&": r"\&",
    "#": r"\#",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "<": "$<$",
    ">": "$>$",
    PLUS_MINUS: r"$\pm$",
    "-": "$-$",
}


def tex_cell(cell: str) -> str:
    """A cell in LaTeX."""
    parts = re.split(r"(\+-|(?<!\w)-(?=\d)|[_%&#$\\{}~^|<>])", cell)  # a hyphen before a number is a minus
    return "".join(_TEX.get(part, part) for part in parts)


# What is written, by the end of the file's name. A new format is a line here.
FORMATS: dict[str, Callable[[Table], str]] = {".md": markdown, ".csv": lambda table: table.csv, ".tex": latex}
