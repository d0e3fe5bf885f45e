"""Means over samples that never leave out the ones that went wrong: one sample without a finite number, and there is no mean."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float


def mean(values: Any) -> float:
    """The mean; NaN as soon as one value is NaN or infinite (`Series.mean` skips NaN)."""
    return weighted(np.asarray(values, float), 1) if len(values) else float("nan")


def weighted(totals: Any, counts: Any) -> float:
    """The sum of `totals` over the sum of `counts`, a count for each or one for all; NaN as soon as one total is not finite."""
    totals = np.asarray(totals, float)
    counted = np.broadcast_to(np.asarray(counts, float), totals.shape).sum()
    return float(totals.sum() / counted) if np.isfinite(totals).all() and counted > 0 else float("nan")


def by_type(samples: pd.DataFrame, column: str) -> dict[str, float]:
    """The mean of a column for each `type` of sample."""
    return {str(kind): mean(group[column]) for kind, group in samples.groupby("type")}


def headline_weights(samples: pd.DataFrame, types: Collection[str], *, by_task: bool) -> Float[np.ndarray, "samples"]:
    """Weights under which the sum of all scores is the headline accuracy.

    With `by_task` the tasks count alike, and samples of a task alike; else these `types` do, and samples of a type alike, the
    others not at all. Without either all samples count alike.
    """
    if not (by_task or types):
        return np.full(len(samples), 1 / len(samples))
    label = samples.task if by_task else samples.type
    counts = label.value_counts()
    heads = [name for name in counts.index if by_task or name in types]
    return label.isin(heads).to_numpy(float) / label.map(counts).to_numpy(float) / max(len(heads), 1)


def clusters_of(sample_ids: pd.Series, noun: str) -> pd.Series:
    """What each sample belongs to, whose samples are not independent: its id without the last part, an image or a topic.

    Passages of one text alone (`noun` is topics) are taken for independent, as its windows are: else nothing could be tested.
    """
    found = sample_ids.str.rpartition("-")[0]
    return sample_ids if noun == "topics" and found.nunique() == 1 else found


def num_broken(values: Any) -> int:
    """How many of the values are NaN or infinite."""
    return int((~np.isfinite(np.asarray(values, float))).sum())


def missing_flags(metrics: Mapping[str, float], number: Callable[[str], int]) -> tuple[str, ...]:
    """`non_finite:METRIC:SAMPLES` for each metric that has no value; `number(metric)` says how many samples took it away."""
    return tuple(f"non_finite:{name}:{number(name)}" for name, value in metrics.items() if not np.isfinite(value))
