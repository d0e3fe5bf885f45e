"""Files that are built from records: tables, figures, and the tables inside the README files."""

import re
from pathlib import Path

import pandas as pd

from mgvq.analysis.records.records import against
from mgvq.analysis.statistics import spread, trainings
from mgvq.analysis.statistics.verdict import verdict
from mgvq.analysis.tables import render
from mgvq.analysis.tables.render import latex_table, markdown_table
from mgvq.analysis.tables.table import rows

# By the end of the file's name: what the figure shows.
FIGURES = {
    "arms": "Every arm: the difference to the baseline with its 95 % interval (filled: p below 0.05, corrected; orange: the "
    "planned comparison; grey: full precision), or, in a study without a baseline, mean and standard deviation over runs.",
    "bits": "Accuracy and answer loss against measured bits a weight; bands and bars are the standard deviation over runs, the "
    "dashed line is full precision.",
    "allocation": "Where the bits went: index bits a weight by layer (rows) and arm (columns), channel groups side by side by "
    "ascending score, means over runs. Arms with the same bits everywhere are left out.",
    "sensitivity": "What each arm took for sensitive: the mean channel score of a layer's groups over that of the model.",
    "usage": "How evenly the centroids are used: the entropy of the stored codes over its maximum, by layer and channel group.",
    "proxy": "The proxy error of each layer after each stage of rounding, over that of the nearest centroids; in the corner the "
    "geometric mean after the last stage.",
}


def write_tables(name: str, records: pd.DataFrame, results: Path) -> list[Path]:
    """`tables/NAME.md`, `.csv` and `.tex` under `results`, `NAME_vs_ARM` for every further baseline, `NAME_spread` for a study
    of seeds, `NAME_trainings` for one of trainings, and `NAME_verdict.md`; returns the files.

    Equal records give equal bytes.
    """
    tables = {name: records}
    for baseline in records.attrs.get("baselines", [])[1:]:
        tables[f"{name}_vs_{re.sub('[^a-z0-9]+', '_', baseline.lower())}"] = against(records, baseline)
    folder = results / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    pages = [(table, render, of_table) for table, of_table in tables.items()]
    pages += [
        (f"{name}_{kind}", page, records)
        for kind, page in (("spread", spread), ("trainings", trainings))
        if records.attrs.get(kind)
    ]
    texts = {f"{name}_verdict.md": "".join(f"* {sentence}\n" for sentence in verdict(records))}
    for table, page, of_table in pages:
        shown = page.printable(of_table), page.note(of_table)
        texts |= {
            f"{table}.md": markdown_table(*shown),
            f"{table}.csv": page.plain(of_table),
            f"{table}.tex": latex_table(*shown),
        }
    for file, text in texts.items():
        (folder / file).write_text(text)
    return [folder / file for file in texts]


def figure_path(results: Path, name: str, kind: str) -> Path:
    """Where `write_figures` puts a figure."""
    return results / "figures" / f"{name}_{kind}.svg"


def write_figures(name: str, records: pd.DataFrame, layers: pd.DataFrame, results: Path) -> list[Path]:
    """`figures/NAME_*.svg` under `results`, those of `FIGURES` for which the study has something to show.

    Equal records and layers give equal bytes, as long as matplotlib is the same.
    """
    # Here: matplotlib takes a second to import, and tables need none of it.
    from mgvq.analysis.figures.drawing import save, style
    from mgvq.analysis.figures.layer_figures import has_stages, heat_map, proxy_figure, varies
    from mgvq.analysis.figures.study_figures import arms_figure, bits_figure, has_bit_widths, has_curves

    table = rows(records)
    for kind in FIGURES:
        figure_path(results, name, kind).unlink(missing_ok=True)
    with style():
        figures = {} if has_curves(table) else {"arms": arms_figure(table, records.attrs.get("baseline"))}
        if has_bit_widths(table):
            figures["bits"] = bits_figure(table)
        for quantity, kind in (("bits", "allocation"), ("sensitivity", "sensitivity"), ("usage", "usage")):
            if varies(layers, quantity):
                figures[kind] = heat_map(layers, quantity)
        if has_stages(layers):
            figures["proxy"] = proxy_figure(layers)
        return [save(figure, figure_path(results, name, kind)) for kind, figure in figures.items()]


def pages_with_tables(root: Path) -> list[Path]:
    """The files of a checkout in which reports keep tables current: its README and those of the studies."""
    return [root / "README.md", *sorted(root.glob("experiments/*/README.md"))]


def with_tables(text: str, tables: Path) -> str:
    """`text` with what stands between `<!-- table NAME -->` and `<!-- end -->` replaced by that table, if there is one."""

    def current(match: re.Match[str]) -> str:
        table = tables / f"{match[2]}.md"
        return f"{match[1]}\n{table.read_text()}{match[3]}" if table.is_file() else match[0]

    return re.sub(r"(<!-- table (\w+) -->)\n.*?(<!-- end -->)", current, text, flags=re.DOTALL)
