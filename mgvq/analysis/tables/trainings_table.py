"""The table of a study of trainings: how much of each figure belongs to the model and how much to its quantising."""

from dataclasses import asdict

import pandas as pd

from mgvq.analysis.records.records import StudyRecord
from mgvq.analysis.statistics.measures import MEASURES
from mgvq.analysis.statistics.trainings import Figure, splits
from mgvq.analysis.tables.missing import told_missing, told_values
from mgvq.analysis.tables.render import Table
from mgvq.analysis.tables.table import column_of, rows, shown_p

_HEADER = ("figure", "arm", "mean", "95 % interval", "each training", "sd of trainings", "sd of seeds", "% trainings", "p")


def trainings_table(record: StudyRecord) -> Table:
    """A line a figure and arm."""
    found = list(splits(record))
    return Table(
        header=list(_HEADER),
        lines=[[_name(figure), figure.arm, *_cells(figure)] for figure in found],
        note=_note(record) + told_values(rows(record)),
        csv=_csv(found),
        warning=told_missing(record),
    )


def _name(figure: Figure) -> str:
    name = column_of(figure.measure)
    return f"{name} - {figure.minus}" if figure.minus else name


def _cells(figure: Figure) -> list[str]:
    measure, split = figure.measure, figure.split

    def shown(value: float, more: int = 0) -> str:
        return f"{value * measure.factor:{'+' if figure.minus and not more else ''}.{measure.decimals + more}f}"

    each = ", ".join(map(shown, split.means))
    cells = [shown(split.mean), f"[{shown(split.low)}, {shown(split.high)}]", each, shown(split.trainings, 1)]
    if split.seeds is None or split.share is None or split.p is None:
        return [*cells, "-", "-", "-"]
    return [*cells, shown(split.seeds, 1), f"{100 * split.share:.0f}", shown_p(split.p)]


def _csv(found: list[Figure]) -> str:
    """The bare numbers in the metrics' own units, a line a figure and arm."""
    lines = [
        {
            "measure": figure.measure.name,
            "minus": figure.minus,
            "arm": figure.arm,
            "mean": figure.split.mean,
            **asdict(figure.split),
            "means": " ".join(f"{mean:.6g}" for mean in figure.split.means),
        }
        for figure in found
    ]
    return pd.DataFrame(lines).to_csv(index=False, float_format="%.6g", lineterminator="\n")


def _note(record: StudyRecord) -> str:
    """What the columns are."""
    trainings = [str(point.values[str(record.trainings)]) for point in record.points]
    seeds = len(set().union(*(cell.seeds for cell in record.cells)))
    units = ", ".join(MEASURES[name].in_words for name in record.kind.measures)
    return (
        f"Trainings: {', '.join(trainings)}; {seeds} seeds of the quantiser each, {record.num_samples:,} questions "
        f"shared by all runs. {units.capitalize()}; differences within a training at equal seeds. Mean: over "
        "trainings, with its 95 % interval for trainings at large (t over the trainings' means). Sd of trainings and of seeds: "
        "the two components of the one-way random-effects analysis; % trainings: the first one's part of their variance. p: of "
        'the F test of "the trainings do not differ". An arm in which nothing is random has one run a training, and its sd is '
        "that of the runs."
    )
