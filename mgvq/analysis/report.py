"""Files that are built from records: tables, figures, and the tables inside the README files.

`TABLES` and `FIGURES` list all that a study may have. A new table or figure is a function that makes it and one entry here.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from mgvq.analysis.figures.drawing import save, style
from mgvq.analysis.figures.layer_figures import has_stages, heat_map, proxy_figure, varies
from mgvq.analysis.figures.study_figures import arms_figure, bits_figure, has_bit_widths, has_curves
from mgvq.analysis.records.records import StudyRecord
from mgvq.analysis.tables.arms import arms_table
from mgvq.analysis.tables.render import FORMATS, Table
from mgvq.analysis.tables.spread_table import spread_table
from mgvq.analysis.tables.table import Row, rows
from mgvq.analysis.tables.trainings_table import trainings_table
from mgvq.analysis.verdict import verdict
from mgvq.studies.spec import file_part


@dataclass(frozen=True, kw_only=True)
class TableOf:
    """A table that a study may have."""

    name: str
    """Its file is `STUDY_NAME`, or `STUDY` where the name is empty."""
    condition: Callable[[StudyRecord], bool]
    """Whether a study has it."""
    make: Callable[[StudyRecord], Table]
    """The table from the record."""
    each_baseline: bool = False
    """Whether it is made once more against every further baseline, as `STUDY_vs_BASELINE`."""


TABLES = (
    TableOf(name="", condition=lambda record: True, make=arms_table, each_baseline=True),
    TableOf(name="spread", condition=lambda record: record.spread is not None, make=spread_table),
    TableOf(name="trainings", condition=lambda record: record.trainings is not None, make=trainings_table),
)


@dataclass(frozen=True, kw_only=True)
class Results:
    """What figures are drawn from."""

    record: StudyRecord
    """The study's record."""
    layers: pd.DataFrame
    """What its runs did to each layer, as `mgvq.analysis.records.layers` describes it."""

    @cached_property
    def table(self) -> list[Row]:
        """The rows of the main table that have runs."""
        return [row for row in rows(self.record) if row.runs]


@dataclass(frozen=True, kw_only=True)
class FigureOf:
    """A figure that a study may have."""

    name: str
    """Its file is `STUDY_NAME.svg`."""
    caption: str
    """What it shows."""
    condition: Callable[[Results], bool]
    """Whether the study has something to show there."""
    make: Callable[[Results], Figure]
    """The figure, drawn inside of `style`."""


FIGURES = (
    FigureOf(
        name="arms",
        caption="Every arm: the difference to the baseline with its 95 % interval (filled: p below 0.05, corrected; orange: the "
        "planned comparison; grey: full precision), or, in a study without a baseline, mean and standard deviation over runs.",
        condition=lambda results: not has_curves(results.table),
        make=lambda results: arms_figure(results.table, results.record.baseline),
    ),
    FigureOf(
        name="bits",
        caption="Accuracy and answer loss against measured bits a weight; bands and bars are the standard deviation over runs, "
        "the dashed line is full precision.",
        condition=lambda results: has_bit_widths(results.table),
        make=lambda results: bits_figure(results.table),
    ),
    FigureOf(
        name="allocation",
        caption="Where the bits went: index bits a weight by layer (rows) and arm (columns), channel groups side by side by "
        "ascending score, means over runs. Arms with the same bits everywhere are left out.",
        condition=lambda results: varies(results.layers, "bits"),
        make=lambda results: heat_map(results.layers, "bits"),
    ),
    FigureOf(
        name="sensitivity",
        caption="What each arm took for sensitive: the mean channel score of a layer's groups over that of the model.",
        condition=lambda results: varies(results.layers, "sensitivity"),
        make=lambda results: heat_map(results.layers, "sensitivity"),
    ),
    FigureOf(
        name="usage",
        caption="How evenly the centroids are used: the entropy of the stored codes over its maximum, by layer and channel "
        "group.",
        condition=lambda results: varies(results.layers, "usage"),
        make=lambda results: heat_map(results.layers, "usage"),
    ),
    FigureOf(
        name="proxy",
        caption="The proxy error of each layer after each stage of rounding, over that of the nearest centroids; in the corner "
        "the geometric mean after the last stage.",
        condition=lambda results: has_stages(results.layers),
        make=lambda results: proxy_figure(results.layers),
    ),
)


def write_tables(name: str, record: StudyRecord, results: Path, tables: Sequence[TableOf] = TABLES) -> list[Path]:
    """Write `tables/NAME*.md`, `.csv` and `.tex` under `results`, those of `tables` that the study has, and `NAME_verdict.md`.

    Returns the files. Equal records give equal bytes.
    """
    made: dict[str, Table] = {}
    for entry in tables:
        if entry.condition(record):
            made["_".join(filter(None, (name, entry.name)))] = entry.make(record)
            for baseline in record.baselines[1:] if entry.each_baseline else ():
                parts = (name, entry.name, "vs", file_part(baseline))
                made["_".join(filter(None, parts))] = entry.make(record.against(baseline))
    texts = {f"{name}_verdict.md": "".join(f"* {sentence}\n" for sentence in verdict(record))}
    texts |= {f"{file}{suffix}": write(table) for file, table in made.items() for suffix, write in FORMATS.items()}
    folder = results / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    return [folder / file for file in texts]


def figure_path(results: Path, name: str, figure: FigureOf) -> Path:
    """Where `write_figures` puts a figure of the study `name`."""
    return results / "figures" / f"{name}_{figure.name}.svg"


def write_figures(
    name: str, record: StudyRecord, layers: pd.DataFrame, results: Path, figures: Sequence[FigureOf] = FIGURES
) -> list[Path]:
    """Write `figures/NAME_*.svg` under `results`, those of `figures` for which the study has something to show.

    Figures of an earlier report that it no longer has are removed. Equal records and layers give equal bytes, as long as
    matplotlib is the same.
    """
    shown = Results(record=record, layers=layers)
    written = []
    with style():
        for entry in figures:
            path = figure_path(results, name, entry)
            path.unlink(missing_ok=True)
            if entry.condition(shown):
                written.append(save(entry.make(shown), path))
    return written


def pages_with_tables(root: Path) -> list[Path]:
    """The files of a checkout in which reports keep tables current: its README and those of the studies."""
    return [root / "README.md", *sorted(root.glob("experiments/*/README.md"))]


def with_tables(text: str, tables: Path) -> str:
    """`text` with what stands between `<!-- table NAME -->` and `<!-- end -->` replaced by that table, if there is one."""

    def current(match: re.Match[str]) -> str:
        table = tables / f"{match[2]}.md"
        return f"{match[1]}\n{table.read_text(encoding='utf-8')}{match[3]}" if table.is_file() else match[0]

    return re.sub(r"(<!-- table ([\w-]+) -->)\n.*?(<!-- end -->)", current, text, flags=re.DOTALL)
