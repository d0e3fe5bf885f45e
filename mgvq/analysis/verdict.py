"""What a study found, in sentences: the planned comparison first, otherwise the best arms."""

from collections.abc import Sequence

import pandas as pd

from mgvq.analysis.records.records import against
from mgvq.analysis.statistics.compare import TESTED_AS, Comparison
from mgvq.analysis.statistics.trainings import splits
from mgvq.analysis.tables.table import COLUMNS, Row, rows

ALPHA = 0.05
_WORDS = {"accuracy": ("accuracy", "points"), "loss": ("answer loss", "nats a token"), "perplexity": ("perplexity", "")}


def verdict(records: pd.DataFrame) -> list[str]:
    """One summary, a sentence a grid point, and how the planned arm fares against each further baseline. The table's numbers."""
    table = rows(records)
    points = list(dict.fromkeys(str(row.point) for row in table))
    parts = [[row for row in table if str(row.point) == point] for point in points]
    if primary := records.attrs.get("primary"):
        rivals = [arm for arm in records.attrs.get("baselines", [])[1:] if arm != primary["arm"]]
        further = [_against(against(records, rival), primary["arm"], primary["metric"]) for rival in rivals]
        again = [_trained_again(records, primary["arm"], primary["metric"])] if records.attrs.get("trainings") else []
        return [*_planned(parts, primary["arm"], primary["metric"], records.attrs["baseline"]), *again, *further]
    if baseline := records.attrs.get("baseline"):
        summary = f"No comparison was planned: every arm is held against {baseline}, corrected for their number."
        return [summary, *(_corrected(part, baseline) for part in parts)]
    return ["No arm is compared with another here; the table describes.", *(_described(part) for part in parts)]


def _against(records: pd.DataFrame, arm: str, metric: str) -> str:
    """One rival at all grid points, corrected for the number of arms."""
    column = _column(metric)
    found = [row.comparisons[column] for row in rows(records) if row.arm == arm]
    said = _counts(found, column, records.attrs["baseline"])
    return f"Against {records.attrs['baseline']}, corrected for the number of arms, by {_WORDS[metric][0]}: {said}."


def _trained_again(records: pd.DataFrame, arm: str, metric: str) -> str:
    """The planned comparison over trainings: what to expect of one that is not in the table."""
    measure, baseline = TESTED_AS.get(metric, metric), records.attrs["baseline"]
    found = next(split for m, other, name, split in splits(records) if (m, other, name) == (measure, baseline, arm))
    c = COLUMNS[_column(metric)]
    name, unit = _WORDS[measure]
    mean, low, high = (f"{value * c.factor:+.{c.decimals}f}" for value in (found.mean, found.low, found.high))
    share = "" if found.share is None else f"; {100 * found.share:.0f} % of the variance lies between trainings"
    settled = "settled" if found.low > 0 or found.high < 0 else "not settled"
    return (
        f"For a model that is trained once more the sign of {arm} - {baseline} is {settled} by {len(found.means)} trainings: "
        f"{name} {mean} {unit} [{low}, {high}]{share}."
    )


def _column(metric: str) -> str:
    return next(name for name, c in COLUMNS.items() if c.measure == TESTED_AS.get(metric, metric))


def _gains(comparison: Comparison, column: str) -> bool:
    return comparison.effect.mean > 0 if COLUMNS[column].better == "max" else comparison.effect.mean < 0


def _counts(found: Sequence[Comparison], column: str, baseline: str) -> str:
    decided = [_gains(c, column) for c in found if c.p < ALPHA]
    counts = {f"better than {baseline} on": sum(decided), "worse on": len(decided) - sum(decided)}
    counts["not shown to differ on"] = len(found) - len(decided)
    said = ", ".join(f"{words} {n}" for words, n in counts.items() if n)
    return f"{said} of {len(found)} grid points"


def _planned(parts: Sequence[Sequence[Row]], arm: str, metric: str, baseline: str) -> list[str]:
    column = _column(metric)
    found = [row for part in parts for row in part if row.arm == arm]  # at some points it may not be run
    sentences = []
    for row in found:
        comparison = row.comparisons[column]
        word = ("better" if _gains(comparison, column) else "worse") if comparison.p < ALPHA else "not shown to differ"
        sentence = f"{place(row)}: {arm} is {word}: {difference(comparison, column, clusters(row))}"
        gap = f", {row.gap_closed:.0f} % of the loss that {baseline} has above full precision avoided" if _has_gap(row) else ""
        sentences.append(f"{sentence}{gap}.")
    said = _counts([row.comparisons[column] for row in found], column, baseline)
    summary = f"The planned comparison, {arm} against {baseline} by {_WORDS[metric][0]}: {said}."
    return [summary, *sentences]


def _has_gap(row: Row) -> bool:
    return row.gap_closed is not None and bool(row.gap_closed > 0)


def _corrected(part: Sequence[Row], baseline: str) -> str:
    column = "loss" if "loss" in part[0].values else "accuracy %"
    found = {row.arm: row.comparisons[column] for row in part if column in row.comparisons and not row.full_precision}
    better, worse = ([arm for arm, c in found.items() if c.p < ALPHA and _gains(c, column) is gains] for gains in (True, False))
    best = max(better, key=lambda arm: abs(found[arm].effect.mean), default=None)
    name, _ = _WORDS[str(COLUMNS[column].measure)]
    text = f"{place(part[0])}: by {name} {len(better)} of {len(found)} arms are better than {baseline}, {len(worse)} worse"
    return f"{text}; the best is {best}: {difference(found[best], column, clusters(part[0]))}." if best else f"{text}."


def _described(part: Sequence[Row]) -> str:
    full = [row for row in part if row.full_precision]
    column, sign, shown = "perplexity", -1, "perplexity {:.2f}"
    if "accuracy %" in part[0].values:
        column, sign, shown = "accuracy %", 1, "{:.1f} %"
    best = max((row for row in part if not row.full_precision), key=lambda row: sign * row.mean(column), default=None)
    if best is None:
        return f"{place(part[0])}: full precision only."
    against = f" of {shown.format(full[0].mean(column))} in full precision" if full else ""
    bits = f"{best.mean('bits, layers'):.2f} measured bits a weight"
    return f"{place(best)}: {best.arm} keeps most, {shown.format(best.mean(column))}{against}, at {bits}."


def clusters(row: Row) -> str:
    """What the samples of a row's runs are independent by."""
    return "topics" if "perplexity" in row.values else "pictures"


def difference(found: Comparison, column: str, by: str) -> str:
    """Mean, interval and p of a comparison in the unit and the digits of the table's column."""
    c = COLUMNS[column]
    name, unit = _WORDS[str(c.measure)]
    e = found.effect
    mean, low, high = (f"{value * c.factor:+.{c.decimals}f}" for value in (e.mean, e.low, e.high))
    p = "p < 0.001" if found.p < 0.001 else f"p = {found.p:.3f}"
    design = "questions only" if e.samples_only else f"{e.num_seeds} seeds x {e.num_samples} {by}"
    return f"{name} {mean} {unit} [{low}, {high}], {p}, {design}"


def place(row: Row) -> str:
    """The grid point of a row in words."""
    return ", ".join(str(v) if isinstance(v, str) else f"{k} {v}" for k, v in row.point.items()) or "all runs"
