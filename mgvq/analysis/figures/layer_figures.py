"""Figures by layer: where bits, sensitivity and codebook use lie, and what each stage of rounding does to a layer's error.

They are drawn from the table that `mgvq.analysis.records.layers` describes.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from mgvq.analysis.figures.drawing import COLOURS, MARKERS, QUIET, panels
from mgvq.analysis.records.layers import PROXY
from mgvq.analysis.records.records import Point

_LEGEND = {
    "bits": "index bits a weight",
    "sensitivity": "mean channel score over that of the model, powers of ten",
    "usage": "entropy of the codes over that of an even use",
}
_COLOURS = {"bits": "viridis", "sensitivity": "PuOr_r", "usage": "cividis"}
_NUM_COLOURS = 40  # matplotlib draws the bar of 50 and more as pixels
_STAGES = {
    "nearest": "nearest centroid",
    "feedback": "error feedback",
    "shifted": "target shifted by the gradient",
    "refit": "centroids refitted",
}


def varies(layers: pd.DataFrame, quantity: str) -> bool:
    """Whether some arm has different values of a quantity in different layers or groups."""
    part = layers[layers.quantity == quantity]
    return bool((part.groupby(["point", "arm"])["value"].nunique() > 1).any())


def heat_map(layers: pd.DataFrame, quantity: str) -> Figure:
    """A panel a grid point: layers by arms, the channel groups of an arm side by side (by ascending score).

    Arms with one value everywhere are left out. `sensitivity` is the score over the mean of the model, in powers of ten from -2
    to 2: definitions have different units. A cell that lacks a value is grey.
    """
    part = layers.loc[layers.quantity == quantity]
    differs = part.arm[part.groupby(["point", "arm"])["value"].transform(lambda values: values.nunique() > 1)]
    part = part.loc[part.arm.isin(differs)]
    part = part.assign(layer=_layer_names(part), shown=_relative(layers, part) if quantity == "sensitivity" else part.value)
    arms = list(part.arm.unique())
    low, high = (-2, 2) if quantity == "sensitivity" else (part.value.min(), part.value.max())
    # A pixel a cell, and so few colours that the bar is drawn as shapes: pixels of edges differ between processors.
    colours = {"cmap": mpl.colormaps[_COLOURS[quantity]].resampled(_NUM_COLOURS), "vmin": low, "vmax": high}
    tables = [(str(point), rows) for point, rows in part.groupby("point", sort=False)]
    figure, flat = _heat_panels([rows.layer.nunique() for _, rows in tables], arms)
    for ax, (point, rows) in zip(flat, tables, strict=True):
        for place, arm in enumerate(arms):
            table = rows[rows.arm == arm].pivot_table(index="layer", columns="group", values="shown", sort=False)
            if not table.empty:
                table = table.reindex(index=rows.layer.unique())[sorted(table)]
                where = (place, place + 1, len(table), 0)
                if table.isna().to_numpy().any():
                    ax.set_facecolor("lightgrey")
                ax.imshow(table.to_numpy(float), extent=where, aspect="auto", interpolation="none", **colours)
        _label(ax, list(rows.layer.unique()), arms)
        ax.set_title(Point(point).title("\n" if len(flat) > 1 and _one_row(flat) else ", "))
    bar = figure.colorbar(flat[0].images[0], ax=flat, aspect=40, pad=0.01)
    bar.solids.set_edgecolor("face")  # type: ignore[union-attr]
    bar.set_label(_LEGEND[quantity])
    return figure


def _heat_panels(num_layers: Sequence[int], arms: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """The panels, one below the other, or side by side where points and their arms are few.

    Layers are so high that their names can be read.
    """
    row = min(0.14, 9 / max(num_layers))
    names = 0.5 + 0.05 * max(map(len, arms))
    if len(num_layers) <= 4 and len(arms) * len(num_layers) <= 8:
        figure, axes = panels(1, len(num_layers), max(num_layers) * row + names)
        return figure, axes[0]
    height = sum(n * row + 0.4 for n in num_layers) + names
    figure, axes = panels(len(num_layers), 1, height, sharex=True, height_ratios=num_layers)
    return figure, [ax for (ax,) in axes]


def _one_row(axes: Sequence[Axes]) -> bool:
    return axes[0].get_subplotspec().get_gridspec().nrows == 1  # type: ignore[union-attr]


def _relative(layers: pd.DataFrame, rows: pd.DataFrame) -> pd.Series:
    """log10 of a mean channel score over that of the model, all weights alike; NaN where the model lacks a score."""
    keys = ["point", "arm", "site", "group"]
    weights = rows[keys].merge(layers[layers.quantity == "weights"], on=keys, how="left").value.to_numpy(float)
    cells = [rows.point, rows.arm]
    values = rows.value.astype(float)
    mean = (values * weights).groupby(cells).transform("sum") / pd.Series(weights, rows.index).groupby(cells).transform("sum")
    mean = mean.mask(values.isna().groupby(cells).transform("any"))  # sums skip what is NaN
    return np.log10((values / mean).clip(lower=1e-12))  # a score may be 0


def _layer_names(rows: pd.DataFrame) -> pd.Series:
    block = rows.block.map(lambda b: "" if pd.isna(b) else f" {int(b)}")
    several = rows.tower.nunique() > 1
    return (rows.tower + " " if several else "") + rows.kind.str.removesuffix("_proj") + block


def _label(ax: Axes, layers: Sequence[str], arms: Sequence[str]) -> None:
    for place in range(1, len(arms)):
        ax.axvline(place, color="white", linewidth=1.5)
    ax.set_xticks(np.arange(len(arms)) + 0.5, arms, rotation=40, ha="right", rotation_mode="anchor")
    step = -(-len(layers) // 60)  # names that can be read
    ax.set_yticks(np.arange(0, len(layers), step) + 0.5, layers[::step], fontsize=6)
    ax.set_ylim(len(layers), 0)
    ax.set_xlim(0, len(arms))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def has_stages(layers: pd.DataFrame) -> bool:
    """Whether some run kept its layers' errors before compensation."""
    return bool((layers.quantity == PROXY[0]).any())


def proxy_figure(layers: pd.DataFrame) -> Figure:
    """A panel an arm and grid point: the proxy error of each layer after each stage, over that of the nearest centroids.

    Below 1 a stage helps. The geometric mean of the layers stands in the panel's corner, a dash where an error is not finite.
    Arms whose runs kept no stages are left out.
    """
    part = layers[layers.quantity.isin(PROXY)]
    cells = [cell for _, cell in part.groupby(["point", "arm"], sort=False) if (cell.quantity == PROXY[0]).any()]
    num_rows = -(-len(cells) // 3)
    figure, axes = panels(num_rows, 3, 1.7 * num_rows + 0.5, sharey=True)
    flat = [ax for line in axes for ax in line]
    for ax, cell in zip(flat, cells, strict=False):
        table = cell.pivot_table(index="site", columns="quantity", values="value", sort=False).astype(float)
        stages = [stage for stage in PROXY if stage in table]
        for stage in stages[1:]:
            ratio = table[stage] / table[PROXY[0]]
            number = PROXY.index(stage) - 1
            how: dict[str, Any] = {"color": COLOURS[number], "marker": MARKERS[number], "label": _STAGES[stage]}
            ax.plot(ratio.to_numpy(), markersize=3, linewidth=0.8, **how)
        ax.axhline(1, color=QUIET, linewidth=0.8)
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("")
        ax.grid(axis="y")
        last = np.exp(np.log(table[stages[-1]] / table[PROXY[0]]).mean())  # over the layers that went through that stage
        shown = "-" if cell.value.isna().any() else f"{last:.2f}"
        ax.text(0.98, 0.04, shown, transform=ax.transAxes, ha="right", va="bottom", color=QUIET)
        ax.set_title(f"{Point(cell.point.iloc[0]).title()}\n{cell.arm.iloc[0]}", fontsize=8)
    for ax in flat[len(cells) :]:
        ax.remove()
    for line in axes:
        line[0].set_ylabel("error / nearest")
    for ax in flat[max(0, len(cells) - 3) : len(cells)]:
        ax.set_xlabel("layer, in the order of the model")
    found: dict[str, Any] = {}
    for ax in flat[: len(cells)]:
        found |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=3)
    return figure
