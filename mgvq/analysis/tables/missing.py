"""What a table has to say of runs and values that are missing: arm and seed by name, and why."""

from collections.abc import Sequence

from mgvq.analysis.records.records import StudyRecord, seeds_in_words
from mgvq.analysis.tables.render import MISSING
from mgvq.analysis.tables.table import Row


def told_missing(record: StudyRecord) -> str:
    """The warning above a table of a partial record: how many runs are missing, which, and why. Empty for a complete one."""
    if not record.missing:
        return ""
    lacking = sum(len(missing.seeds) for _, missing in record.missing)
    parts = [
        f"{cell.arm} ({cell.point.words}), {seeds_in_words(missing.seeds)}: {' '.join(missing.reason.split())}"
        for cell, missing in record.missing
    ]
    total = lacking + sum(len(cell.seeds) for cell in record.cells)
    return f"PARTIAL: {lacking} of {total} runs are missing, and no number here is final. {'; '.join(parts)}."


def told_values(table: Sequence[Row]) -> str:
    """A paragraph for the note that names the values that are not finite, by arm and seed; empty where there are none."""
    parts = [
        f"{name} of {row.arm} ({row.point.words}) at {seeds_in_words(seeds)}"
        for row in table
        for name, seeds in row.lacking.items()
    ]
    if not parts:
        return ""
    return f"\n\n{MISSING} : no mean and no comparison, because runs have no finite value: {'; '.join(parts)}."
