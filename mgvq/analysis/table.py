"""The table of a study: a row an arm and grid point, mean and spread over the distinct runs of its seeds."""

import numpy as np
import pandas as pd

from mgvq.analysis.records import metric_frame

# Column -> metric, factor, decimals.
COLUMNS = {
    "accuracy %": ("tiny_vqa/accuracy", 100, 1),
    "loss": ("loss/answer", 1, 3),
    "KL": ("kl/full_precision", 1, 3),
    "bits, layers": ("bits/quantized_layers", 1, 3),
    "bits, model": ("bits/model", 1, 2),
    "quantise s": ("time/quantize_s", 1, 1),
    "evaluate s": ("time/evaluate_s", 1, 1),
}
_NOTE = "Mean +- standard deviation over runs; a method in which nothing is random has one run."


def table(records: pd.DataFrame) -> pd.DataFrame:
    """Strings ready to print: `mean +- sd` over n runs; a single run has no spread. `flags` counts the fallbacks taken."""
    frame = metric_frame(records)
    keys = [*frame.attrs["points"], "arm"]
    rows = []
    for _, part in frame.groupby(keys, sort=False, dropna=False):
        row = {key.rsplit(".", 1)[-1]: part[key].iloc[0] for key in keys}
        for column, (metric, factor, decimals) in COLUMNS.items():
            row[column] = _spread(part[metric].to_numpy(float) * factor, decimals)
        rows.append({**row, "runs": len(part), "flags": sum(map(len, part["flags"])) or "-"})
    return pd.DataFrame(rows)


def markdown(records: pd.DataFrame) -> str:
    """The table with a line that says what its numbers are."""
    drawn = f"{records.num_samples.iloc[0]:,} test questions, the same for every run. {_NOTE}"
    return f"{table(records).to_markdown(index=False, disable_numparse=True)}\n\n{drawn}\n"


def _spread(values: np.ndarray, decimals: int) -> str:
    mean = f"{values.mean():.{decimals}f}"
    return mean if len(values) == 1 else f"{mean} +- {values.std(ddof=1):.{decimals}f}"
