"""Heat maps of the frame of channel scores that `mgvq.quantization.scoring` makes."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from mgvq.analysis.statistics.sensitivity import layer_means, rank_correlation
from mgvq.analysis.tables.sensitivity_tables import number


def draw_figures(name: str, scores: pd.DataFrame, results: Path) -> list[Path]:
    """Write `figures/sensitivity_NAME_layers.png` and `_ranks.png` under `results`, and return them."""
    paths = []
    for kind, figure in (("layers", layers_figure(name, scores)), ("ranks", ranks_figure(name, scores))):
        path = results / "figures" / f"sensitivity_{name}_{kind}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, metadata={"Software": None})  # no version of the library: equal scores, equal bytes
        paths.append(path)
    return paths


def layers_figure(name: str, scores: pd.DataFrame) -> Figure:
    """A map of layers by definitions: the mean score of each layer over that of the model, in powers of ten, 0 in grey."""
    means = layer_means(scores)
    ticks = {-2: "1/100", -1: "1/10", 0: "1", 1: "10", 2: "100"}
    figure = _heat_map(means.where(means > 0).map(np.log10), ticks, colours="PuOr_r", row_height=0.25)
    figure.suptitle(f"{name}: mean score of a layer over that of the model", fontsize=10)
    return figure


def ranks_figure(name: str, scores: pd.DataFrame) -> Figure:
    """A map of definitions by definitions: `rank_correlation` with its numbers."""
    ranks = rank_correlation(scores)
    figure = _heat_map(ranks, {-1: "-1", 0: "0", 1: "1"}, colours="RdBu_r", row_height=0.4)
    figure.suptitle(
        f"{name}: Spearman correlation of channel scores\nbelow the diagonal over all channels, above it within layers",
        fontsize=10,
    )
    for (row, column), value in np.ndenumerate(ranks.to_numpy()):
        colour = "white" if abs(value) > 0.6 else "black"
        figure.axes[0].text(column, row, number(value), ha="center", va="center", fontsize=8, color=colour)
    return figure


def _heat_map(values: pd.DataFrame, ticks: Mapping[int, str], *, colours: str, row_height: float) -> Figure:
    """A map with rows `row_height` inches high and NaN in grey, and a colour bar from the least to the greatest of `ticks`."""
    rows, columns = values.shape
    figure = Figure(figsize=(5 + 0.5 * columns, 2 + row_height * rows), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("lightgrey")
    image = axes.imshow(values.to_numpy(float), cmap=colours, vmin=min(ticks), vmax=max(ticks), aspect="auto")
    axes.set_xticks(range(columns), list(values.columns), rotation=45, ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_yticks(range(rows), list(values.index), fontsize=9)
    figure.colorbar(image, ax=axes).set_ticks(list(ticks), labels=list(ticks.values()))
    return figure
