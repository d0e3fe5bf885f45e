"""The table of a study of seeds: how far apart its runs are, arm by arm."""

from dataclasses import asdict

import numpy as np
import pandas as pd

from mgvq.analysis.records.records import StudyRecord
from mgvq.analysis.statistics.measures import MEASURES
from mgvq.analysis.statistics.spread import Spread, spreads
from mgvq.analysis.tables.missing import told_missing, told_values
from mgvq.analysis.tables.render import MISSING, Table
from mgvq.analysis.tables.table import column_of, rows

_PARTS = ("sd of runs", "95 % interval", "% of variance", "sd, any question", "sd of questions")


def spread_table(record: StudyRecord) -> Table:
    """A line an arm; the arm `record.spread` is the whole that the others are parts of."""
    found = spreads(record)
    names = {measure: column_of(MEASURES[measure]) for measure in record.kind.measures}
    header = ["point", "arm", *(f"{name}: {part}" for name in names.values() for part in _PARTS), "runs"]
    lines = []
    for point, arm in dict.fromkeys((point, arm) for _, point, arm in found):
        cells = [point.text, arm]
        for measure in names:
            cells += _cells(found[measure, point, arm], found.get((measure, point, str(record.spread))), measure)
        lines.append([*cells, str(found[next(iter(names)), point, arm].num_runs)])
    if len({line[0] for line in lines}) == 1:  # the note names the point
        header, lines = header[1:], [line[1:] for line in lines]
    return Table(
        header=header,
        lines=lines,
        note=_note(record) + told_values(rows(record)),
        csv=_csv(found),
        warning=told_missing(record),
    )


def _cells(mine: Spread, whole: Spread | None, measure: str) -> list[str]:
    if not np.isfinite(mine.runs):
        return [MISSING] * len(_PARTS)
    unit = MEASURES[measure]
    sds = [f"{sd * unit.factor:.{unit.decimals + 1}f}" for sd in (mine.runs, mine.low, mine.high, mine.seeds, mine.questions)]
    share = MISSING
    if whole is not None and np.isfinite(whole.runs):
        share = f"{100 * (mine.runs / whole.runs) ** 2 if whole.runs else float('nan'):.0f}"
    return [sds[0], f"[{sds[1]}, {sds[2]}]", share, sds[3], sds[4]]


def _csv(found: dict) -> str:
    """The bare numbers in the metrics' own units, a line a measure, grid point and arm."""
    lines = [{"measure": m, "point": p.text, "arm": a, **asdict(spread)} for (m, p, a), spread in found.items()]
    return pd.DataFrame(lines).to_csv(index=False, float_format="%.6g", lineterminator="\n")


def _note(record: StudyRecord) -> str:
    """What the columns are."""
    words = (f"{key} {value}" for key, value in record.points[0].values.items())
    only = f" All rows: {', '.join(words)}." if len(record.points) == 1 else ""
    units = ", ".join(MEASURES[name].in_words for name in record.kind.measures)
    return (
        f"Standard deviations, {units}. Sd of runs: between runs that answer the same "
        f"{record.num_samples:,} questions, with its chi-square interval. % of variance: its square over that of "
        f'"{record.spread}"; parts whose draws interact need not add up to 100. Sd, any question: what would stay '
        "of it if there were no end of questions (0 where the estimate is not above 0). Sd of questions: what drawing the test "
        f"questions anew would add.{only}"
    )
