"""The published numbers and ours as Markdown, CSV and LaTeX, and the 2-bit rows as a figure with error bars."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from mgvq.analysis.figures.drawing import COLOURS, QUIET, panels, save, style
from mgvq.analysis.records.records import StudyRecord, read_record
from mgvq.analysis.statistics.measures import ACCURACY, MEASURES
from mgvq.analysis.statistics.significance import Effect, paired_difference, reweighted
from mgvq.analysis.tables.paper import EVIDENCE, Beside, TwoBits, Work, judge, mismatch, read_works
from mgvq.analysis.tables.render import MISSING, Table, latex, markdown
from mgvq.analysis.tables.table import Row, column_of, rows
from mgvq.errors import UserError

Lines = list[list[str]]
_CLAIMS = "Does the arithmetic of what is printed hold?"
_BESIDE = "Ours beside theirs"
_TWO_BITS = "The 2-bit rows"
_PUBLISHED = "What is published"
_NOT_FOUND = "What was not found"
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
    _NOT_FOUND: "Looked for in stored public texts, and not read at a source: no number of these stands above.",
    _PUBLISHED: "All numbers as printed there. Evidence: " + "; ".join(f"{tag} {words}" for tag, words in EVIDENCE.items()) + ".",
}


def write_paper(results: Path) -> list[Path]:
    """Write `tables/paper.md`, `.csv` and `.tex` and `figures/paper_two_bits.svg` under `results`, and return the files.

    They are made from `paper/*.yaml` and the records, both there too. Equal files give equal bytes. Raises UserError for a bad
    yaml or an arm that its study does not have.
    """
    works = read_works(results / "paper")
    two_bits = next((work.two_bits for work in works if work.two_bits), None)
    if two_bits is None:
        raise UserError(f"{results / 'paper'}: no file has `two_bits`, the rows that the figure shows.")
    names = {two_bits.study, *(beside.ours.study for work in works for beside in work.beside)}
    paths = {name: results / "records" / f"{name}.parquet" for name in sorted(names)}
    records = {name: read_record(path) for name, path in paths.items() if path.is_file()}
    means = _means(two_bits, records)
    lines = {
        _CLAIMS: _claims(works),
        _BESIDE: _all_beside(works, records),
        _TWO_BITS: _rows(two_bits, means),
        _PUBLISHED: _published(works),
        _NOT_FOUND: [["work", "what"], *([work.work, what] for work in works for what in work.not_found)],
    }
    tables = {
        title: Table(header=header, lines=cells, note=_NOTES[title].format(study=two_bits.study))
        for title, (header, *cells) in lines.items()
    }
    folder = results / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / f"paper{suffix}": write(tables) for suffix, write in _FORMATS.items()}
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    with style():
        figure = save(two_bits_figure(two_bits, means), results / "figures" / "paper_two_bits.svg")
    return [*files, figure]


def _claims(works: Sequence[Work]) -> Lines:
    lines = [["work", "claim", "printed", "computed", "verdict", "where"]]
    for work in works:
        for c in work.claims:
            first, second = (number.value for number in c.minus)
            printed = f"{c.value} {c.unit}" if c.value else "the same"
            lines.append([work.work, c.says, printed, f"{first} - {second} = {c.computed}", c.verdict, c.where])
    return lines


def _all_beside(works: Sequence[Work], records: Mapping[str, StudyRecord]) -> Lines:
    lines = [["work", "what", "theirs", "on", "ours", "on ", "direction", "verdict", "note"]]
    for work in works:
        for beside in work.beside:
            theirs = [work.work, beside.says, _theirs(beside), beside.theirs[0].model]
            record = records.get(beside.ours.study)
            found = [_one_beside(beside, row, record) for row in _our_rows(beside, record)] if record else []
            lines += [[*theirs, *ours, beside.note] for ours in found or [["-", "-", "-", "not run"]]]
    return lines


def _theirs(beside: Beside) -> str:
    unit = beside.theirs[0].unit
    return f"{beside.value:+} {'points' if unit == '%' else unit}"


def _our_rows(beside: Beside, record: StudyRecord) -> list[Row]:
    ours = beside.ours
    for arm in (ours.arm, ours.against):
        if arm not in record.arms:
            raise UserError(f"results/paper: {ours.study} has no arm {arm!r}; it has {', '.join(record.arms)}.")
    return [row for row in rows(record.against(ours.against)) if row.arm == ours.arm]


def _one_beside(beside: Beside, row: Row, record: StudyRecord) -> list[str]:
    """What we found, on what, the direction, and the verdict."""
    measure = MEASURES[beside.ours.measure]
    found = row.comparisons.get(column_of(measure))
    if found is None:
        return [MISSING, row.point.title(), MISSING, "not comparable: ours has no finite value"]
    mean, low, high = (x * measure.factor for x in (found.effect.mean, found.effect.low, found.effect.high))
    reasons = mismatch(
        beside.theirs[0],
        model=str(row.point.short.get("model")),
        benchmark=record.kind.headline.split("/")[0],
        bits=row.mean("bits, layers"),
        measure=measure.name,
    )
    verdict = f"not comparable: {', '.join(reasons)}" if reasons else judge(beside.value, mean, low, high)
    direction = "open" if low <= 0 <= high else "same" if (mean > 0) == (beside.value > 0) else "opposite"
    return [_interval(mean, low, high, measure.decimals, sign="+"), row.point.title(), direction, verdict]


def _interval(mean: float, low: float, high: float, decimals: int, sign: str = "") -> str:
    return f"{mean:{sign}.{decimals}f} [{low:{sign}.{decimals}f}, {high:{sign}.{decimals}f}]"


@dataclass(frozen=True, kw_only=True)
class _Mean:
    """What an arm of ours reaches at one grid point."""

    accuracy: Effect
    """The headline accuracy with its interval; NaN where a score is missing."""
    bits: float
    """Measured bits a weight."""


def _means(two_bits: TwoBits, records: Mapping[str, StudyRecord]) -> dict[str, dict[str, _Mean]]:
    """The means by grid point and arm. Empty where the study has no record."""
    record = records.get(two_bits.study)
    if record is None:
        return {}
    wanted = [arm for _, arm, _ in two_bits.rows if arm is not None]
    if unknown := sorted(set(wanted) - set(record.arms)):
        raise UserError(f"results/paper: {two_bits.study} has no arm {', '.join(unknown)}; it has {', '.join(record.arms)}.")
    weights, clusters = ACCURACY.weigh(record.questions, record.kind), record.questions.picture.to_numpy()
    means: dict[str, dict[str, _Mean]] = {}
    for cell in record.cells:
        if cell.arm in wanted:
            accuracy = paired_difference(reweighted(cell.values(ACCURACY.column), weights, clusters))
            bits = cell.metric("bits/quantized_layers").tolist()
            means.setdefault(cell.point.title(), {})[cell.arm] = _Mean(accuracy=accuracy, bits=sum(bits) / len(bits))
    return means


def _rows(two_bits: TwoBits, means: Mapping[str, Mapping[str, _Mean]]) -> Lines:
    numbers = [number for _, _, number in two_bits.rows if number]
    published = f"published, {numbers[0].model}"
    lines = [["method", published, *means]]
    for method, arm, number in two_bits.rows:
        theirs = f"{number.value} ({number.bits})" if number else "-"
        lines.append([method, theirs, *(_shown(found.get(arm)) if arm else "not run" for found in means.values())])
    return lines


def _shown(found: _Mean | None) -> str:
    if found is None or not math.isfinite(found.accuracy.mean):
        return MISSING
    effect = found.accuracy
    return f"{_interval(100 * effect.mean, 100 * effect.low, 100 * effect.high, 1)} ({found.bits:.2f})"


def _published(works: Sequence[Work]) -> Lines:
    lines = [["work", "method", "number", "on", "benchmark", "bits", "where", "evidence"]]
    for work in works:
        for n in work.numbers.values():
            value = f"{n.value} {n.unit}" if n.unit in n.metric or n.unit == "h" else f"{n.value} {n.unit} {n.metric}"
            lines.append(
                [
                    work.work,
                    n.method,
                    value,
                    n.model,
                    n.benchmark or "not named",
                    "not named" if n.bits is None else str(n.bits),
                    n.where,
                    n.evidence,
                ]
            )
    return lines


def two_bits_figure(two_bits: TwoBits, means: Mapping[str, Mapping[str, _Mean]]) -> Figure:
    """A panel a grid point of our study, one for what is published: accuracy of every method, ours with 95 % intervals."""
    methods = [method for method, _, _ in two_bits.rows]
    model = next(number.model for _, _, number in two_bits.rows if number)
    figure, ((*ours, theirs),) = panels(1, len(means) + 1, 0.9 + 0.24 * len(methods), sharex=True, sharey=True)
    for ax, (point, found) in zip(ours, means.items(), strict=True):
        for line, (_, arm, _) in enumerate(two_bits.rows):
            if arm and arm in found:
                effect = found[arm].accuracy
                colour = QUIET if found[arm].bits > 8 else COLOURS[0]
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


def _markdown(tables: Mapping[str, Table]) -> str:
    """Each under a heading with its title."""
    return "\n".join(f"## {title}\n{markdown(table)}" for title, table in tables.items())


def _csv(tables: Mapping[str, Table]) -> str:
    """One after the other, each under a line with its title."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for title, table in tables.items():
        writer.writerow([title])
        writer.writerows([table.header, *table.lines])
        writer.writerow([])
    return text.getvalue()


def _latex(tables: Mapping[str, Table]) -> str:
    """Each under a comment with its title."""
    return "\n".join(f"% {title}\n{latex(table)}" for title, table in tables.items())


_FORMATS = {".md": _markdown, ".csv": _csv, ".tex": _latex}
