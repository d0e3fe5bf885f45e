"""What a study found, in sentences: the planned comparison first, otherwise the best arms."""

import math
from collections.abc import Sequence

from mgvq.analysis.records.records import StudyRecord
from mgvq.analysis.statistics.compare import Comparison
from mgvq.analysis.statistics.leniency import told_lenient
from mgvq.analysis.statistics.measures import MEASURES, Measure, measure_of, noun_of
from mgvq.analysis.statistics.trainings import splits
from mgvq.analysis.tables.missing import told_missing
from mgvq.analysis.tables.table import Row, column_of, rows, seeds_compared


def verdict(record: StudyRecord) -> list[str]:
    """One summary, a sentence a grid point, and how the planned arm fares against each further baseline. The table's numbers.

    A partial record says first which runs are missing.
    """
    table = rows(record)
    missing = [told_missing(record)] if record.missing else []
    lenient = list(filter(None, [told_lenient(seeds_compared(table))]))
    parts = [[row for row in table if row.point == point] for point in record.points]
    if record.primary is not None:
        arm, metric = record.primary["arm"], record.primary["metric"]
        further = [_against(record.against(rival), arm, metric) for rival in record.baselines[1:] if rival != arm]
        again = [_trained_again(record, arm, metric)] if record.trainings else []
        return [*missing, *_planned(record, parts, arm, metric), *again, *further, *lenient]
    if record.baseline is not None:
        summary = f"No comparison was planned: every arm is held against {record.baseline}, corrected for their number."
        return [*missing, summary, *(_corrected(record, part) for part in parts), *lenient]
    summary = "No arm is compared with another here; the table describes."
    return [*missing, summary, *(_described(part) for part in parts)]


def _against(record: StudyRecord, arm: str, metric: str) -> str:
    """How an arm fares against another baseline at all grid points, corrected for the number of arms."""
    measure = measure_of(metric)
    said = _counts([row for row in rows(record) if row.arm == arm], measure, record.baseline)
    return f"Against {record.baseline}, corrected for the number of arms, by {noun_of(metric)}: {said}."


def _trained_again(record: StudyRecord, arm: str, metric: str) -> str:
    """The planned comparison over trainings: what to expect of one that is not in the table."""
    measure = measure_of(metric)
    wanted = (measure, record.baseline, arm)
    figure = next((f for f in splits(record) if (f.measure, f.minus, f.arm) == wanted), None)
    if figure is None:
        return f"Whether another training would turn {arm} - {record.baseline} cannot be said: values are missing."
    found = figure.split
    mean, low, high = map(measure.shown, (found.mean, found.low, found.high))
    share = "" if found.share is None else f"; {100 * found.share:.0f} % of the variance lies between trainings"
    settled = "settled" if found.low > 0 or found.high < 0 else "not settled"
    return (
        f"For a model that is trained once more the sign of {arm} - {record.baseline} is {settled} by {len(found.means)} "
        f"trainings: {measure.noun} {mean} {measure.unit} [{low}, {high}]{share}."
    )


def _counts(table: Sequence[Row], measure: Measure, baseline: str | None) -> str:
    """At how many grid points an arm, which has a row for each, is better or worse than the baseline."""
    column = column_of(measure)
    found = [row.comparisons[column] for row in table if column in row.comparisons]
    decided = [measure.is_better(c.effect.mean) for c in found if c.is_decided]
    suggested = [measure.is_better(c.effect.mean) for c in found if c.is_suggestive]
    counts = {f"better than {baseline} on": sum(decided), "worse on": len(decided) - sum(decided)}
    counts |= {"suggestively better on": sum(suggested), "suggestively worse on": len(suggested) - sum(suggested)}
    counts["not shown to differ on"] = len(found) - len(decided) - len(suggested)
    counts["without a value on"] = len(table) - len(found)
    said = ", ".join(f"{words} {n}" for words, n in counts.items() if n)
    return f"{said} of {len(table)} grid points"


def _planned(record: StudyRecord, parts: Sequence[Sequence[Row]], arm: str, metric: str) -> list[str]:
    measure = measure_of(metric)
    table = [row for part in parts for row in part if row.arm == arm]  # at some points it may not be run
    sentences = []
    for row in table:
        comparison = row.comparisons.get(column_of(measure))
        if comparison is None:
            sentences.append(f"{row.point.words}: {arm} has no value to compare.")
            continue
        word = "better" if measure.is_better(comparison.effect.mean) else "worse"
        if not comparison.is_decided:
            word = f"suggestively {word}" if comparison.is_suggestive else "not shown to differ"
        sentence = f"{row.point.words}: {arm} is {word}: {_difference(record, comparison, measure)}"
        has_gap = row.gap_closed is not None and row.gap_closed > 0
        gap = f", {row.gap_closed:.0f} % of the loss that {record.baseline} has above full precision avoided" if has_gap else ""
        sentences.append(f"{sentence}{gap}.")
    said = _counts(table, measure, record.baseline)
    summary = f"The planned comparison, {arm} against {record.baseline} by {noun_of(metric)}: {said}."
    return [summary, *sentences]


def _corrected(record: StudyRecord, part: Sequence[Row]) -> str:
    """How many arms of a grid point are better than the baseline, and which most."""
    measure = MEASURES["loss" if "loss" in part[0].values else "accuracy"]
    column = column_of(measure)
    rivals = [row for row in part if row.arm != record.baseline and not row.full_precision]
    found = {row.arm: row.comparisons[column] for row in rivals if column in row.comparisons}
    decided = {arm: c for arm, c in found.items() if c.is_decided}
    suggested = [arm for arm, c in found.items() if c.is_suggestive]
    better = [arm for arm, c in decided.items() if measure.is_better(c.effect.mean)]
    text = (
        f"{part[0].point.words}: by {measure.noun} {len(better)} of {len(rivals)} arms are better than {record.baseline}, "
        f"{len(decided) - len(better)} worse"
    )
    text += f", {len(suggested)} suggestively one of the two" if suggested else ""
    text += f", {len(rivals) - len(found)} without a value" if len(found) < len(rivals) else ""
    best = max(better, key=lambda arm: abs(found[arm].effect.mean), default=None)
    return f"{text}; the best is {best}: {_difference(record, found[best], measure)}." if best else f"{text}."


def _described(part: Sequence[Row]) -> str:
    """The best arm of a grid point, beside full precision."""
    place = part[0].point.words
    full = [row for row in part if row.full_precision]
    column, sign, shown = "perplexity", -1, "perplexity {:.2f}"
    if "accuracy %" in part[0].values:
        column, sign, shown = "accuracy %", 1, "{:.1f} %"
    quantised = [row for row in part if not row.full_precision]
    if not quantised:
        return f"{place}: full precision only."
    known = [row for row in quantised if math.isfinite(row.mean(column))]
    without = f" ({len(quantised) - len(known)} of {len(quantised)} arms have no value)" if len(known) < len(quantised) else ""
    if not known:
        return f"{place}: no quantised arm has a value."
    best = max(known, key=lambda row: sign * row.mean(column))
    of_full = [row.mean(column) for row in full if math.isfinite(row.mean(column))]
    against = f" of {shown.format(of_full[0])} in full precision" if of_full else ""
    bits = f"{best.mean('bits, layers'):.2f} measured bits a weight"
    return f"{place}: {best.arm} keeps most, {shown.format(best.mean(column))}{against}, at {bits}{without}."


def _difference(record: StudyRecord, found: Comparison, measure: Measure) -> str:
    """Mean, interval and p of a comparison in the unit and the digits of the table's column."""
    e = found.effect
    mean, low, high = map(measure.shown, (e.mean, e.low, e.high))
    p = "p < 0.001" if found.p < 0.001 else f"p = {found.p:.3f}"
    design = "questions only" if e.samples_only else f"{e.num_seeds} seeds x {e.num_samples} {record.kind.clusters}"
    return f"{measure.noun} {mean} {measure.unit} [{low}, {high}], {p}, {design}"
