"""Each preset that numerics 3 moved, after minus before, on the questions and seeds that study e01_main has of it.

    python experiments/numerics_3/compare.py

Reads the records of both studies, prints the table and writes it to results/tables/numerics_3_before.md.
"""

from pathlib import Path

import numpy as np

from mgvq.analysis.records.records import Cell, read_record
from mgvq.analysis.statistics.compare import paired_values
from mgvq.analysis.statistics.measures import MEASURES
from mgvq.analysis.statistics.significance import holm, paired_difference, reweighted
from mgvq.runs.places import results_folder

BEFORE, AFTER = "e01_main", "numerics_3"


def table(records: Path) -> str:
    """The table in Markdown, from the two records in the folder."""
    before, after = (read_record(records / f"{name}.parquet") for name in (BEFORE, AFTER))
    earlier = {(cell.point, cell.arm): cell for cell in before.cells}
    rows = []
    for cell in after.cells:
        other: Cell = earlier[cell.point, cell.arm]
        if other.runs[0].samples != cell.runs[0].samples:
            raise SystemExit(f"{cell.point.words}, {cell.arm}: the two studies asked different questions")
        for name in after.kind.measures:
            measure = MEASURES[name]
            pair = paired_values(cell, other, measure.column)
            assert pair is not None, "both studies have the seeds 0 to 2"
            weights = measure.weigh(after.questions, after.kind)
            effect = paired_difference(reweighted(pair, weights, after.questions.picture.to_numpy()))
            rows.append((cell.point.words, cell.arm, name, effect))
    lines = [
        f"{AFTER} minus {BEFORE} (numerics 2), the same questions and seeds, with 95 % intervals; p after Holm over all rows.",
        "",
        "| model | preset | measure | after - before | interval | p |",
        "| :-- | :-- | :-- | --: | --: | --: |",
    ]
    corrected = holm(np.array([effect.p for *_, effect in rows]))
    for (point, arm, name, effect), p in zip(rows, corrected, strict=True):
        interval = f"{effect.low:+.4f} to {effect.high:+.4f}"
        lines.append(f"| {point} | {arm} | {name} | {effect.mean:+.4f} | {interval} | {p:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write and print."""
    text = table(results_folder() / "records")
    (results_folder() / "tables" / f"{AFTER}_before.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
