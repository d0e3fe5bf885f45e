"""The main table of a study: a line an arm and grid point, what it measured, and how it compares with the baseline."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mgvq.analysis.records.records import StudyRecord
from mgvq.analysis.statistics.compare import PROCEDURE, Comparison
from mgvq.analysis.statistics.leniency import told_lenient
from mgvq.analysis.statistics.measures import MEASURES, Measure
from mgvq.analysis.tables.missing import told_missing, told_values
from mgvq.analysis.tables.render import MISSING, PLUS_MINUS, Table
from mgvq.analysis.tables.table import Column, Row, columns_of, rows, seeds_compared, shown_p

GAP = "loss gap closed %"
DIFFERENCE = "vs baseline"


def arms_table(record: StudyRecord) -> Table:
    """Cells `mean +- sd`, `difference [interval]` and p. Grid keys with one value stand in the note.

    A column's best arm of every grid point is bold, ties as printed; full precision takes no part. Where a run has no finite
    value of a metric, its arm has none: the cell is marked, and the note says which seeds lack it.
    """
    table, columns = rows(record), columns_of(record)
    compared = record.baseline is not None
    keys = [key for key in table[0].point.short if not _is_constant(table, key)]
    cells = [(key, [str(row.point.short[key]) for row in table]) for key in keys]
    cells.append(("arm", [row.arm for row in table]))
    bold: set[tuple[int, int]] = set()
    for name, column in columns.items():
        if compared and column.better:
            bold |= {(line, len(cells)) for line in _best(table, name, column)}
        cells.append((name, [_mean(row, name, column) for row in table]))
        if compared and column.measure:
            measure = column.measure
            found = [(row, row.comparisons.get(name)) for row in table]
            cells.append((DIFFERENCE, [_difference(c, measure) if c else _none(row, record) for row, c in found]))
            cells.append(("p", [_p(c) if c else _none(row, record) for row, c in found]))
        if column.measure is MEASURES["loss"] and _has_gap(table):
            cells.append((GAP, ["-" if row.gap_closed is None else f"{row.gap_closed:.0f}" for row in table]))
    cells.append(("runs", [_runs(row) for row in table]))
    cells.append(("flags", [str(row.flags or "-") for row in table]))
    return Table(
        header=[name for name, _ in cells],
        lines=list(map(list, zip(*(column for _, column in cells), strict=True))),
        note=_note(record, table),
        csv=_csv(record, table, columns),
        warning=told_missing(record),
        bold=frozenset(bold),
    )


def _is_constant(table: Sequence[Row], key: str) -> bool:
    return len({str(row.point.short[key]) for row in table}) == 1


def _has_gap(table: Sequence[Row]) -> bool:
    return any(row.gap_closed is not None for row in table)


def _mean(row: Row, name: str, column: Column) -> str:
    mean, sd = row.mean(name), row.sd(name)
    if not math.isfinite(mean):
        return MISSING
    shown = f"{mean:.{column.decimals}f}"
    return shown if sd is None else f"{shown} {PLUS_MINUS} {sd:.{column.decimals}f}"


def _difference(found: Comparison, measure: Measure) -> str:
    mean, low, high = (measure.shown(value) for value in (found.effect.mean, found.effect.low, found.effect.high))
    return f"{mean} [{low}, {high}]"


def _p(found: Comparison) -> str:
    marks = " (planned)" * found.planned + " (questions only)" * found.effect.samples_only
    return shown_p(found.p) + marks


def _none(row: Row, record: StudyRecord) -> str:
    """The baseline has no difference to itself; any other arm without one lacks values."""
    return "-" if row.arm == record.baseline else MISSING


def _runs(row: Row) -> str:
    lacking = sum(len(missing.seeds) for missing in row.missing)
    return f"{len(row.runs)} ({lacking} missing)" if lacking else str(len(row.runs))


def _best(table: Sequence[Row], name: str, column: Column) -> list[int]:
    """The lines of the best of every grid point."""
    values = [round(row.mean(name), column.decimals) for row in table]
    rivals: dict[Any, list[float]] = {}
    for row, value in zip(table, values, strict=True):
        if not (row.full_precision or math.isnan(value)):
            rivals.setdefault(row.point, []).append(value)
    choose = max if column.better == "max" else min
    best = {point: choose(found) for point, found in rivals.items()}
    return [
        line
        for line, (row, value) in enumerate(zip(table, values, strict=True))
        if not row.full_precision and value == best.get(row.point)
    ]


def _csv(record: StudyRecord, table: Sequence[Row], columns: Mapping[str, Column]) -> str:
    """A line an arm and grid point: the numbers to six digits, run ids, and the commands that make the runs."""
    partial = bool(record.missing)
    lacking = any(row.lacking for row in table)
    lines = []
    for row in table:
        line: dict[str, Any] = {**row.point.short, "arm": row.arm}
        for name, column in columns.items():
            line |= {name: row.mean(name), f"{name} sd": row.sd(name)}
            if column.measure and record.baseline is not None:
                line |= _csv_comparison(name, column.factor, row.comparisons.get(name))
        gap = {GAP: row.gap_closed} if "loss" in columns else {}
        line |= {**gap, "runs": len(row.runs), "flags": row.flags}
        if partial:
            line["seeds missing"] = " ".join(str(seed) for missing in row.missing for seed in missing.seeds)
        if lacking:
            line["values missing"] = "; ".join(f"{name}: {' '.join(map(str, seeds))}" for name, seeds in row.lacking.items())
        lines.append(line | {"run ids": " ".join(row.runs), "commands": "; ".join(row.commands)})
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _csv_cell(value) for key, value in line.items()} for line in lines)
    return text.getvalue()


def _csv_cell(value: Any) -> Any:
    """Six digits; nothing for a number that is missing."""
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"


def _csv_comparison(name: str, factor: int, found: Comparison | None) -> dict[str, object]:
    keys = ("difference", "low", "high", "se", "df", "p", "p adjusted", "planned", "questions only")
    if found is None:
        return {f"{name} {key}": None for key in keys}
    e = found.effect
    scaled = [value * factor for value in (e.mean, e.low, e.high, e.se)]
    values = (*scaled, e.df, e.p, found.p, found.planned, e.samples_only)
    return {f"{name} {key}": value for key, value in zip(keys, values, strict=True)}


def _note(record: StudyRecord, table: Sequence[Row]) -> str:
    """What the numbers of the table are, and how arms are compared."""
    kind = record.kind
    text = (
        f"{record.num_samples:,} test {kind.samples}, the same for every run. "
        "Mean +- standard deviation over runs; a method in which nothing is random has one run."
    )
    if kind.by_task:
        text += (
            " Accuracy: the mean over the tasks, then of each as it reads and scores an answer, nothing for one that names no "
            "option. Corrected: a wrong choice of k costs 1/(k - 1), so that blind choices come to 0. Unparsed: answers that "
            "name no option."
        )
    if constant := [f"{key} {value}" for key, value in table[0].point.short.items() if _is_constant(table, key)]:
        text += f" All rows: {', '.join(constant)}."
    if record.baseline is not None:
        text += f"\n\n{_comparison_note(record, table)}"
    return text + told_values(table)


def _comparison_note(record: StudyRecord, table: Sequence[Row]) -> str:
    kind = record.kind
    by_point = [len(set().union(*(cell.seeds for cell in record.at(point).values()))) for point in record.points]
    num_seeds, most = min(by_point), max(by_point)
    many = f"{num_seeds}" if most == num_seeds else f"{num_seeds} to {most}"
    design = f"{many} seed{'s' * (most > 1)} x {_told_clusters(record, table)}"
    units = ", ".join(MEASURES[name].in_words for name in kind.measures)
    text = (
        f"{DIFFERENCE}: difference to {record.baseline}, {units}, with its 95 % interval. p: of a {PROCEDURE.test_name} over "
        f"{design}, after {PROCEDURE.correction_name} over the arms of a grid point. (planned): the primary "
        "comparison of the study, not adjusted. (questions only): one run against one run, so nothing is said about other seeds."
    )
    if num_seeds > 1:
        text += f" By the signs of the seeds' differences alone no p below {2 / 2**num_seeds:.2g} could be reached."
    if lenient := told_lenient(seeds_compared(table)):
        text += f" {lenient}"
    if "perplexity" in kind.planned:
        text += " Perplexity is the exponential of the loss: the test of the one is that of the other."
    text += " Bold: the best of its grid point, full precision apart."
    if _has_gap(table):
        text += f" {GAP.capitalize()}: what the arm avoids of the loss that the baseline has above full precision."
    return text


def _told_clusters(record: StudyRecord, table: Sequence[Row]) -> str:
    """How many clusters of questions the tests are over; by column where one leaves out questions that do not weigh in it."""
    noun = record.kind.clusters
    found = {name: c.effect.num_samples for row in table for name, c in row.comparisons.items()}
    if len(set(found.values())) <= 1:
        return f"{next(iter(found.values()), record.questions.picture.nunique()):,} {noun}"
    return ", ".join(f"{number:,} {noun} ({name.removesuffix(' %')})" for name, number in found.items())
