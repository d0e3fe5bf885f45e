"""Figures of a study's table: every arm with its interval, and accuracy and loss against measured bits."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from mgvq.analysis.figures.drawing import COLOURS, QUIET, look, panels
from mgvq.analysis.records.records import Point
from mgvq.analysis.statistics.measures import MEASURES, Measure
from mgvq.analysis.tables.table import Row, column_of

BITS = "bits, layers"
_BUDGET = "bits_per_weight"  # the grid key whose values are one curve


def arms_figure(table: Sequence[Row], baseline: str | None) -> Figure:
    """A panel a grid point and measure, a line an arm: the difference to the baseline with its 95 % interval, or mean +- standard
    deviation where the study has no baseline.

    Filled: p below 0.05 as in the table. Arms far off the others (four times their median distance) become an arrow with
    the number; arms without a value have an empty line.
    """
    points = list(dict.fromkeys(row.point for row in table))
    by_point = {point: [row for row in table if row.point == point] for point in points}
    height = sum(0.75 + 0.185 * len(part) for part in by_point.values())
    ratios = [4 + len(part) for part in by_point.values()]
    measures = _measures(table)
    figure, axes = panels(len(points), len(measures), height, sharey="row", height_ratios=ratios)
    for line, part in zip(axes, by_point.values(), strict=True):
        for ax, measure in zip(line, measures, strict=True):
            _differences(ax, part, measure) if baseline else _means(ax, part, measure)
            ax.set_yticks(range(len(part)), [row.arm for row in part])
            ax.set_ylim(len(part) - 0.5, -0.5)
            ax.tick_params(axis="y", length=0)
            ax.xaxis.set_major_locator(MaxNLocator(5))
            ax.grid(axis="x")
            ax.set_xlabel(f"{measure.noun}, {measure.unit}, against {baseline}" if baseline else _label(measure))
        line[0].set_title(_point_name(part[0].point, table))
    return figure


def _measures(table: Sequence[Row]) -> list[Measure]:
    """The measures that the study has."""
    return [measure for measure in MEASURES.values() if column_of(measure) in table[0].values]


def _label(measure: Measure) -> str:
    return f"{measure.noun}, {measure.scale}"


def _differences(ax: Axes, part: Sequence[Row], measure: Measure) -> None:
    effects = {i: (row, found) for i, row in enumerate(part) if (found := row.comparisons.get(column_of(measure)))}
    if not effects:
        return
    ends = {i: np.array([e.effect.mean, e.effect.low, e.effect.high]) * measure.factor for i, (_, e) in effects.items()}
    usual = 4 * float(np.median([abs(x[0]) for x in ends.values()]))
    inside = np.array([x for x in ends.values() if abs(x[0]) <= usual])
    left, right = min(inside.min(), 0), max(inside.max(), 0)
    room = 0.06 * (right - left)
    ax.set_xlim(left - room, right + room)
    ax.axvline(0, color=QUIET, linewidth=0.8)
    for i, (row, found) in effects.items():
        mean, low, high = ends[i]
        colour = QUIET if row.full_precision else COLOURS[1] if found.planned else COLOURS[0]
        if abs(mean) > usual:
            edge, align = (right + room, "right") if mean > 0 else (left - room, "left")
            arrow = "\N{RIGHTWARDS ARROW}" if mean > 0 else "\N{LEFTWARDS ARROW}"
            number = f"{mean:+.{min(measure.decimals, 2)}f}"
            text = f"{number} {arrow}" if mean > 0 else f"{arrow} {number}"
            ax.text(edge, i, text, color=colour, ha=align, va="center", fontsize=7.5)
            continue
        ax.plot([low, high], [i, i], color=colour, solid_capstyle="butt")
        ax.plot(mean, i, "o", color=colour, markerfacecolor=colour if found.p < 0.05 else "white")


def _means(ax: Axes, part: Sequence[Row], measure: Measure) -> None:
    column = column_of(measure)
    for i, row in enumerate(part):
        colour, spread = QUIET if row.full_precision else COLOURS[0], row.sd(column)
        if spread is not None:
            ax.plot(np.add(row.mean(column), [-spread, spread]), [i, i], color=colour, solid_capstyle="butt")
        ax.plot(row.mean(column), i, "o", color=colour)


def has_bit_widths(table: Sequence[Row]) -> bool:
    """The quantised arms of the study differ by more than a quarter of a measured bit."""
    bits = [row.mean(BITS) for row in table if not row.full_precision]
    return bool(bits) and bool(max(bits) - min(bits) > 0.25)


def has_curves(table: Sequence[Row]) -> bool:
    """The budget is a grid key of the study, so that arms are curves over it."""
    return _BUDGET in table[0].point.short


def bits_figure(table: Sequence[Row]) -> Figure:
    """Accuracy and loss against measured bits, an arm a curve over the budgets (or a mark), its band mean +- standard deviation
    over runs; dashed: full precision."""
    places = list(dict.fromkeys(_place(row) for row in table))
    arms = list(dict.fromkeys(row.arm for row in table if not row.full_precision))
    legend_lines = -(-len(arms) // 3) + 1
    measures = _measures(table)
    figure, axes = panels(len(places), len(measures), 2.5 * len(places) + 0.18 * legend_lines)
    for line, place in zip(axes, places, strict=True):
        part = [row for row in table if _place(row) == place]
        for ax, measure in zip(line, measures, strict=True):
            column = column_of(measure)
            for full in [row for row in part if row.full_precision][:1]:
                ax.axhline(full.mean(column), color=QUIET, linestyle="--", linewidth=1)
            for number, arm in enumerate(arms):
                curve = sorted((row for row in part if row.arm == arm), key=lambda row: row.mean(BITS))
                _curve(ax, curve, column, {**look(number), "label": arm})
            ax.set_xlabel("measured bits a weight, layers in scope")
            ax.set_ylabel(_label(measure))
            ax.grid()
            if measure is MEASURES["loss"]:
                ax.set_yscale("log")
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
                ax.yaxis.set_major_formatter("{x:g}")
                ax.yaxis.set_minor_formatter("")
        line[0].set_title(_point_name(part[0].point, table, without=_BUDGET))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _place(row: Row) -> str:
    """The grid point but for the budget."""
    return str({key: value for key, value in row.point.short.items() if key != _BUDGET})


def _curve(ax: Axes, curve: Sequence[Row], column: str, how: dict[str, Any]) -> None:
    curve = [row for row in curve if np.isfinite(row.mean(column))]
    x, y = (np.array([row.mean(name) for row in curve]) for name in (BITS, column))
    spread = np.array([row.sd(column) or 0.0 for row in curve])
    if len(curve) > 1:
        ax.plot(x, y, **how)
        ax.fill_between(x, y - spread, y + spread, color=how["color"], alpha=0.18, linewidth=0)
    else:
        ax.errorbar(x, y, spread, linestyle="none", **how)


def _point_name(point: Point, table: Sequence[Row], without: str | None = None) -> str:
    """The values of a grid point, those apart that all points share, and without those of one key."""
    own = {key: value for key, value in point.short.items() if key != without}
    varying = {key: value for key, value in own.items() if len({str(row.point.short[key]) for row in table}) > 1}
    return Point.named(varying or own)
