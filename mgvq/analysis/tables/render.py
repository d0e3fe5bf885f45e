"""A study's table as Markdown, CSV and LaTeX. Equal records give equal text."""

import csv
import io
import math
import re
from collections.abc import Sequence

import pandas as pd
from tabulate import tabulate

from mgvq.analysis.records.records import questions
from mgvq.analysis.statistics.compare import Comparison, kind_of
from mgvq.analysis.tables.table import Row, columns_of, rows, shown_p

GAP = "loss gap closed %"
_UNITS = {"accuracy": "accuracy in points", "loss": "loss in nats a token"}


def markdown(records: pd.DataFrame) -> str:
    """The table with lines that say what its numbers are."""
    return markdown_table(printable(records), note(records))


def markdown_table(lines: Sequence[Sequence[str]], note: str) -> str:
    """Header and cells, the note below."""
    header, *cells = lines
    return f"{tabulate(cells, header, 'pipe', disable_numparse=True)}\n\n{note}\n"


def latex(records: pd.DataFrame) -> str:
    """The table as a booktabs tabular, the note as a comment above it."""
    return latex_table(printable(records), note(records))


def latex_table(lines: Sequence[Sequence[str]], note: str) -> str:
    """Header and cells as a booktabs tabular, the note as a comment above it."""
    header, *cells = (" & ".join(map(tex_cell, line)) + r" \\" for line in lines)
    comment = "\n".join(f"% {line}" for line in note.splitlines() if line)
    body = "\n".join([header, r"\midrule", *cells])
    return f"{comment}\n\\begin{{tabular}}{{{'l' * header.count(' & ')}l}}\n\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"


def plain(records: pd.DataFrame) -> str:
    """CSV with a row an arm and grid point: the numbers to six digits, run ids, and the commands that make the runs."""
    table = rows(records)
    lines = []
    for row in table:
        line = {**row.point, "arm": row.arm}
        for name, column in columns_of(records).items():
            line |= {name: row.mean(name), f"{name} sd": row.sd(name)}
            if column.measure and records.attrs.get("baseline") is not None:
                line |= _plain_comparison(name, column.factor, row.comparisons.get(name))
        gap = {GAP: row.gap_closed} if "loss" in row.values else {}
        line |= {**gap, "runs": len(row.runs), "flags": row.flags}
        lines.append(line | {"run ids": " ".join(row.runs), "commands": "; ".join(row.commands)})
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()} for line in lines)
    return text.getvalue()


def _plain_comparison(name: str, factor: int, found: Comparison | None) -> dict[str, object]:
    keys = ("difference", "low", "high", "se", "df", "p", "p adjusted", "planned", "questions only")
    if found is None:
        return {f"{name} {key}": None for key in keys}
    e = found.effect
    scaled = [value * factor for value in (e.mean, e.low, e.high, e.se)]
    values = (*scaled, e.df, e.p, found.p, found.planned, e.samples_only)
    return {f"{name} {key}": value for key, value in zip(keys, values, strict=True)}


def printable(records: pd.DataFrame) -> list[list[str]]:
    """Header and cells: `mean +- sd`, `difference [interval]`, p, `**best**`. Grid keys with one value stand in the note."""
    table = rows(records)
    compared = records.attrs.get("baseline") is not None
    keys = [key for key in table[0].point if not _is_constant(table, key)]
    columns = [(key, [str(row.point[key]) for row in table]) for key in keys]
    columns.append(("arm", [row.arm for row in table]))
    for name, column in columns_of(records).items():
        cells = [_spread(row.mean(name), row.sd(name), column.decimals) for row in table]
        if compared and column.better:
            cells = _bold(cells, table, [round(row.mean(name), column.decimals) for row in table], column.better)
        columns.append((name, cells))
        if compared and column.measure:
            found = [row.comparisons.get(name) for row in table]
            columns.append(("vs baseline", [_difference(c, column.factor, column.decimals) for c in found]))
            columns.append(("p", [_p(c) for c in found]))
        if column.measure == "loss" and _has_gap(table):
            columns.append((GAP, ["-" if row.gap_closed is None else f"{row.gap_closed:.0f}" for row in table]))
    columns.append(("runs", [str(len(row.runs)) for row in table]))
    columns.append(("flags", [str(row.flags or "-") for row in table]))
    return [[name for name, _ in columns], *map(list, zip(*(cells for _, cells in columns), strict=True))]


def _is_constant(table: Sequence[Row], key: str) -> bool:
    return len({str(row.point[key]) for row in table}) == 1


def _has_gap(table: Sequence[Row]) -> bool:
    return any(row.gap_closed is not None for row in table)


def _spread(mean: float, sd: float | None, decimals: int) -> str:
    return f"{mean:.{decimals}f}" if sd is None else f"{mean:.{decimals}f} +- {sd:.{decimals}f}"


def _difference(found: Comparison | None, factor: int, decimals: int) -> str:
    if found is None:
        return "-"
    mean, low, high = (f"{value * factor:+.{decimals}f}" for value in (found.effect.mean, found.effect.low, found.effect.high))
    return f"{mean} [{low}, {high}]"


def _p(found: Comparison | None) -> str:
    if found is None:
        return "-"
    marks = " (planned)" * found.planned + " (questions only)" * found.effect.samples_only
    return shown_p(found.p) + marks


def _bold(cells: Sequence[str], table: Sequence[Row], values: Sequence[float], better: str) -> list[str]:
    """The best of every grid point in bold, ties as printed; full precision takes no part, nor does what is no number."""
    choose = max if better == "max" else min
    rivals: dict[str, list[float]] = {}
    for row, value in zip(table, values, strict=True):
        if not (row.full_precision or math.isnan(value)):
            rivals.setdefault(str(row.point), []).append(value)
    best = [choose(rivals.get(str(row.point), [math.nan])) for row in table]
    marked = zip(cells, table, values, best, strict=True)
    return [f"**{cell}**" if value == top and not row.full_precision else cell for cell, row, value, top in marked]


def note(records: pd.DataFrame) -> str:
    """What the numbers of the table are, and how arms are compared."""
    table, kind = rows(records), kind_of(records)
    text = (
        f"{records.num_samples.iloc[0]:,} test {kind.samples}, the same for every run. "
        "Mean +- standard deviation over runs; a method in which nothing is random has one run."
    )
    if kind.by_task:
        text += (
            " Accuracy: the mean over the tasks, then of each as it reads and scores an answer, nothing for one that names no "
            "option. Corrected: a wrong choice of k costs 1/(k - 1), so that blind choices come to 0. Unparsed: answers that "
            "name no option."
        )
    if constant := [f"{key} {value}" for key, value in table[0].point.items() if _is_constant(table, key)]:
        text += f" All rows: {', '.join(constant)}."
    if (baseline := records.attrs.get("baseline")) is None:
        return text
    by_point = [len({seed for seeds in part.seeds for seed in seeds}) for _, part in records.groupby("point")]
    num_seeds, most = min(by_point), max(by_point)
    pictures = questions(records).picture.nunique()
    many = f"{num_seeds}" if most == num_seeds else f"{num_seeds} to {most}"
    design = f"{many} seed{'s' * (most > 1)} x {pictures:,} {kind.clusters}"
    units = ", ".join(_UNITS[measure] for measure in kind.measures)
    text += (
        f"\n\nvs baseline: difference to {baseline}, {units}, with its 95 % interval. p: of a "
        f"two-way random-effects t test over {design}, after Holm over the arms of a grid point. (planned): the primary "
        "comparison of the study, not adjusted. (questions only): one run against one run, so nothing is said about other seeds."
    )
    if num_seeds > 1:
        text += f" By the signs of the seeds' differences alone no p below {2 / 2**num_seeds:.2g} could be reached."
    if "perplexity" in kind.planned:
        text += " Perplexity is the exponential of the loss: the test of the one is that of the other."
    text += " Bold: the best of its grid point, full precision apart."
    if _has_gap(table):
        text += f" {GAP.capitalize()}: what the arm avoids of the loss that the baseline has above full precision."
    return text


_TEX = {
    "_": r"\_",
    "%": r"\%",
    "&": r"\&",
    "#": r"\#",
    "$": r"\$",
    "\\": r"\textbackslash{}",
    "<": "$<$",
    "+-": r"$\pm$",
    "-": "$-$",
}


def tex_cell(cell: str) -> str:
    """A cell of `printable` in LaTeX."""
    text, bold = re.subn(r"^\*\*(.*)\*\*$", r"\1", cell)
    parts = re.split(r"(\+-|(?<!\w)-(?=\d)|[_%&#$\\<])", text)  # a hyphen before a number is a minus
    text = "".join(_TEX.get(part, part) for part in parts)
    return rf"\textbf{{{text}}}" if bold else text
