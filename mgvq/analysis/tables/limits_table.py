"""The table of how near each arm's layers come to the rate-distortion limit, by kind of layer."""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from mgvq.analysis.records.records import Point
from mgvq.analysis.tables.render import FORMATS, Table

_NOTE = (
    "The error of the stored layers as a multiple of the least that any code of as many bits could leave of Gaussian layers, in "
    "the metric that they were rounded in: 1 is the limit. Geometric means over the weights of a kind, of means over runs."
)


def write_limits(name: str, layers: pd.DataFrame, results: Path) -> list[Path]:
    """Write `tables/NAME_limits.md`, `.csv` and `.tex` under `results`; none where no layer has a limit. Returns the files."""
    if (table := limits_table(layers)) is None:
        return []
    folder = results / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}_limits{suffix}" for suffix in FORMATS]
    for path, write in zip(paths, FORMATS.values(), strict=True):
        path.write_text(write(table), encoding="utf-8")
    return paths


def limits_table(layers: pd.DataFrame) -> Table | None:
    """A line a grid point and arm, a column a kind of layer in the order of the data; None where no layer has a limit.

    `layers` is what `mgvq.analysis.records.layers` describes.
    """
    keys = ["point", "arm", "site"]
    weights = layers[layers.quantity == "weights"].groupby(keys).value.sum().rename("weights")
    known = layers[(layers.quantity == "times_limit") & (layers.value > 0)].join(weights, on=keys)
    if known.empty:
        return None
    logs = known.assign(of=known.tower + " " + known.kind, log=np.log(known.value.astype(float)) * known.weights)
    sums = logs.pivot_table(index=["point", "arm"], columns="of", values=["log", "weights"], aggfunc="sum", sort=False)
    means = (sums["log"] / sums["weights"]).map(math.exp).loc[:, list(dict.fromkeys(logs.of))]
    means = means.reindex(list(dict.fromkeys(zip(logs.point, logs.arm, strict=True))))
    header = ["point", "arm", *means.columns]
    lines = [[Point(point).words, arm, *map(_cell, row)] for (point, arm), row in zip(means.index, means.to_numpy(), strict=True)]
    if means.index.get_level_values("point").nunique() == 1:
        header, lines = header[1:], [line[1:] for line in lines]
    csv = means.reset_index().to_csv(index=False, float_format="%.6g", lineterminator="\n")
    return Table(header=header, lines=lines, note=_NOTE, csv=csv)


def _cell(times: float) -> str:
    return "-" if np.isnan(times) else f"{times:.3g}"
