"""The published numbers and ours as Markdown, CSV and LaTeX, and the 2-bit rows as a picture with error bars."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from tabulate import tabulate

from mgvq.analysis.figures.drawing import COLOURS, QUIET, panels, save, style
from mgvq.analysis.records.records import against, questions, read_records, values_by_seed
from mgvq.analysis.statistics.compare import headline_weights
from mgvq.analysis.statistics.significance import Effect, paired_difference, reweighted
from mgvq.analysis.tables.paper import EVIDENCE, Beside, TwoBits, Work, judge, mismatch, read_works
from mgvq.analysis.tables.render import tex_cell
from mgvq.analysis.tables.table import COLUMNS, Row, rows
from mgvq.errors import UserError

BENCHMARK = COLUMNS["accuracy %"].metric.split("/")[0]
Table = list[list[str]]
_CLAIMS = "Does the arithmetic of what is printed hold?"
_BESIDE = "Ours beside theirs"
_TWO_BITS = "The 2-bit rows"
_PUBLISHED = "What is published"
_NOTES = {
    _CLAIMS: "Computed: the difference of the two printed numbers. Within rounding: off by no more than half a unit of the last "
    "digit of each. Where one thing is printed twice, the two should not differ.",
    _BESIDE: "Ours: the difference of two arms with its 95 % interval (two-way random effects, seeds x pictures), accuracy in "
    "points, loss in nats a token. Reproduced: ours rounds to the published number; inside the interval: that lies in ours; not "
    "reproduced: it does not; not comparable: why stands beside it. Direction: whether ours shows the same side as theirs, or is "
    "open, its interval holding both.",
    _TWO_BITS: "Accuracy in percent with its 95 % interval over seeds and pictures, measured bits a weight in brackets. "
    "Published numbers are of other models and other benchmarks than ours: compare rows within a column. Not run: no arm of "
    "{study} is it.",
    _PUBLISHED: "All numbers as printed there. Evidence: " + "; ".join(f"{tag} {words}" for tag, words in EVIDENCE.items()) + ".",
}


def write_paper(results: Path) -> list[Path]:
    """`tables/paper.md`, `.csv` and `.tex` and `figures/paper_two_bits.svg`, from `paper/*.yaml` and the records under `results`.

    Equal files give equal bytes. Raises UserError for a bad yaml or an arm that its study does not have.
    """
    works = read_works(results / "paper")
    two_bits = next(work.two_bits for work in works if work.two_bits)
    names = {two_bits.study, *(beside.ours.study for work in works for beside in work.beside)}
    paths = {name: results / "records" / f"{name}.parquet" for name in sorted(names)}
    records = {name: read_records(path) for name, path in paths.items() if path.is_file()}
    means = _means(two_bits, records)
    tables = {
        _CLAIMS: _claims(works),
        _BESIDE: _all_beside(works, records),
        _TWO_BITS: _rows(two_bits, means),
        _PUBLISHED: _published(works),
    }
    notes = {title: note.format(study=two_bits.study) for title, note in _NOTES.items()}
    folder = results / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / f"paper{suffix}": render(tables, notes) for suffix, render in _FORMATS.items()}
    for path, text in files.items():
        path.write_text(text)
    with style():
        picture = save(two_bits_figure(two_bits, means), results / "figures" / "paper_two_bits.svg")
    return [*files, picture]


def _claims(works: Sequence[Work]) -> Table:
    lines = [["work", "claim", "printed", "computed", "verdict", "where"]]
    for work in works:
        for c in work.claims:
            first, second = (number.value for number in c.minus)
            printed = f"{c.value} {c.unit}" if c.value else "the same"
            lines.append([work.work, c.says, printed, f"{first} - {second} = {c.computed}", c.verdict, c.where])
    return lines


def _all_beside(works: Sequence[Work], records: Mapping[str, pd.DataFrame]) -> Table:
    lines = [["work", "what", "theirs", "on", "ours", "on ", "direction", "verdict", "note"]]
    for work in works:
        for beside in work.beside:
            theirs = [work.work, beside.says, _theirs(beside), beside.theirs[0].model]
            found = [_one_beside(beside, row) for row in _our_rows(beside, records)]
            lines += [[*theirs, *ours, beside.note] for ours in found or [["-", "-", "-", "not run"]]]
    return lines


def _theirs(beside: Beside) -> str:
    unit = beside.theirs[0].unit
    return f"{beside.value:+} {'points' if unit == '%' else unit}"


def _our_rows(beside: Beside, records: Mapping[str, pd.DataFrame]) -> list[Row]:
    ours = beside.ours
    if ours.study not in records:
        return []
    table = rows(against(records[ours.study], ours.against))
    for arm in (ours.arm, ours.against):
        if arm not in {row.arm for row in table}:
            raise UserError(f"results/paper: {ours.study} has no arm {arm!r}; it has {', '.join({r.arm: 0 for r in table})}.")
    return [row for row in table if row.arm == ours.arm]


def _one_beside(beside: Beside, row: Row) -> list[str]:
    """Ours, on what, direction, verdict."""
    column = next(name for name, c in COLUMNS.items() if c.measure == beside.ours.measure)
    c, effect = COLUMNS[column], row.comparisons[column].effect
    mean, low, high = (x * c.factor for x in (effect.mean, effect.low, effect.high))
    reasons = mismatch(
        beside.theirs[0],
        model=str(row.point.get("model")),
        benchmark=BENCHMARK,
        bits=row.mean("bits, layers"),
        measure=beside.ours.measure,
    )
    verdict = f"not comparable: {', '.join(reasons)}" if reasons else judge(beside.value, mean, low, high)
    direction = "open" if low <= 0 <= high else "same" if (mean > 0) == (beside.value > 0) else "opposite"
    return [_interval(mean, low, high, c.decimals, sign="+"), _point(row.point), direction, verdict]


def _interval(mean: float, low: float, high: float, decimals: int, sign: str = "") -> str:
    return f"{mean:{sign}.{decimals}f} [{low:{sign}.{decimals}f}, {high:{sign}.{decimals}f}]"


def _point(point: Mapping[str, Any]) -> str:
    return ", ".join(map(str, point.values()))


def _means(two_bits: TwoBits, records: Mapping[str, pd.DataFrame]) -> dict[str, dict[str, tuple[Effect, float]]]:
    """By grid point and arm: accuracy with its interval, and measured bits. Empty where the study has no record."""
    if two_bits.study not in records:
        return {}
    table = records[two_bits.study]
    wanted = [arm for _, arm, _ in two_bits.rows if arm is not None]
    if unknown := sorted(set(wanted) - set(table.arm)):
        raise UserError(
            f"results/paper: {two_bits.study} has no arm {', '.join(unknown)}; it has {', '.join(table.arm.unique())}."
        )
    asked = questions(table)
    weights, pictures = headline_weights(asked), asked.picture.to_numpy()
    means: dict[str, dict[str, tuple[Effect, float]]] = {}
    for (point, arm), part in table.loc[table.arm.isin(wanted)].groupby(["point", "arm"], sort=False):  # type: ignore[misc]
        effect = paired_difference(reweighted(values_by_seed(part, "scores"), weights, pictures))
        bits = [json.loads(metrics)["bits/quantized_layers"] for metrics in part.metrics]
        means.setdefault(_point(json.loads(str(point))), {})[str(arm)] = effect, sum(bits) / len(bits)
    return means


def _rows(two_bits: TwoBits, means: Mapping[str, Mapping[str, tuple[Effect, float]]]) -> Table:
    numbers = [number for _, _, number in two_bits.rows if number]
    published = f"published, {numbers[0].model}"
    lines = [["method", published, *means]]
    for method, arm, number in two_bits.rows:
        theirs = f"{number.value} ({number.bits})" if number else "-"
        lines.append([method, theirs, *(_mean(*found[arm]) if arm else "not run" for found in means.values())])
    return lines


def _mean(effect: Effect, bits: float) -> str:
    return f"{_interval(100 * effect.mean, 100 * effect.low, 100 * effect.high, 1)} ({bits:.2f})"


def _published(works: Sequence[Work]) -> Table:
    lines = [["work", "method", "number", "on", "benchmark", "bits", "where", "evidence"]]
    for work in works:
        for n in work.numbers.values():
            value = f"{n.value} {n.unit}" if n.unit in n.metric or n.unit == "h" else f"{n.value} {n.unit} {n.metric}"
            lines.append([work.work, n.method, value, n.model, n.benchmark or "not named", str(n.bits), n.where, n.evidence])
    return lines


def two_bits_figure(two_bits: TwoBits, means: Mapping[str, Mapping[str, tuple[Effect, float]]]) -> Figure:
    """A panel a grid point of our study, one for what is published: accuracy of every method, ours with 95 % intervals."""
    methods = [method for method, _, _ in two_bits.rows]
    model = next(number.model for _, _, number in two_bits.rows if number)
    figure, ((*ours, theirs),) = panels(1, len(means) + 1, 0.9 + 0.24 * len(methods), sharex=True, sharey=True)
    for ax, (point, found) in zip(ours, means.items(), strict=True):
        for line, (_, arm, _) in enumerate(two_bits.rows):
            if arm:
                effect, bits = found[arm]
                colour = QUIET if bits > 8 else COLOURS[0]
                ax.plot([100 * effect.low, 100 * effect.high], [line, line], color=colour, solid_capstyle="butt")
                ax.plot(100 * effect.mean, line, "o", color=colour)
        ax.set_title(point)
    for line, (_, _, number) in enumerate(two_bits.rows):
        if number:
            theirs.plot(float(number.value), line, "D", color=COLOURS[1])
    theirs.set_title(f"published: {model}")
    for ax in (*ours, theirs):
        ax.set_xlabel("accuracy, %")
        ax.grid(axis="x")
        ax.tick_params(axis="y", length=0)
    theirs.set_yticks(range(len(methods)), methods)
    theirs.set_ylim(len(methods) - 0.5, -0.5)
    return figure


def _markdown(tables: Mapping[str, Table], notes: Mapping[str, str]) -> str:
    parts = [
        f"## {title}\n{tabulate(lines, header, 'pipe', disable_numparse=True)}\n\n{notes[title]}\n"
        for title, (header, *lines) in tables.items()
    ]
    return "\n".join(parts)


def _csv(tables: Mapping[str, Table], _: Mapping[str, str]) -> str:
    """One after the other, each under a line with its title."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for title, lines in tables.items():
        writer.writerow([title])
        writer.writerows(lines)
        writer.writerow([])
    return text.getvalue()


def _latex(tables: Mapping[str, Table], notes: Mapping[str, str]) -> str:
    return "\n".join(_tabular(title, lines, notes[title]) for title, lines in tables.items())


def _tabular(title: str, lines: Table, note: str) -> str:
    header, *body = (" & ".join(map(tex_cell, line)) + r" \\" for line in lines)
    columns = "l" * len(lines[0])
    inside = "\n".join([r"\toprule", header, r"\midrule", *body, r"\bottomrule"])
    return f"% {title}\n% {note}\n\\begin{{tabular}}{{{columns}}}\n{inside}\n\\end{{tabular}}\n"


_FORMATS = {".md": _markdown, ".csv": _csv, ".tex": _latex}
