"""What the model card says of an evaluation: each measure of the model, of full precision, and of the difference."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mgvq.checkpoint.card import Estimate, Score
from mgvq.runs.declared import declared
from mgvq.types import EvalResult

_WIDTH = 1.96  # standard errors to either side of a mean hold it in 95 of 100 cases


def scores(result: EvalResult, evaluation: Mapping[str, Any]) -> list[Score]:
    """One for each of the measures that the evaluation declares and that has numbers; none for an evaluation that declares none.

    Every type of the evaluation's headline counts alike. Samples of one picture, or topic, are not independent: the intervals
    are those of a ratio of sums over pictures.
    """
    kind = declared(evaluation).get("kind", {})
    samples, clusters = result.samples, kind.get("clusters", "pictures")
    of_what = samples.sample_id.str.rpartition("-")[0]
    found = []
    for measure in kind.get("measures", ()):
        column, counts = ("score", _type_weights(samples, kind)) if measure == "accuracy" else ("loss", samples.num_tokens)
        values = samples[column] * (counts if measure == "accuracy" else 1)
        if not np.isfinite(values[counts > 0]).all() or not (counts > 0).any():
            continue
        both = None
        if result.reference is not None:
            other = result.reference[column].to_numpy() * (counts if measure == "accuracy" else 1)
            both = estimate(other, counts, of_what), estimate(values - other, counts, of_what)
        name = f"{measure}, nats a token" if measure == "loss" else measure
        number = f"{int((counts > 0).sum())} {kind.get('samples', 'questions')} of {of_what[counts > 0].nunique()} {clusters}"
        found.append(Score(name, number, estimate(values, counts, of_what), *(both or (None, None))))
    return found


def estimate(totals: Sequence[float] | Any, counts: Any, clusters: pd.Series) -> Estimate:
    """The sum of `totals` over the sum of `counts`, with the interval in which it lies; no interval for a single cluster."""
    totals, counts = np.asarray(totals, float), np.asarray(counts, float)
    value = float(totals.sum() / counts.sum())
    _, cluster = np.unique(clusters.to_numpy(), return_inverse=True)
    sums = np.bincount(cluster, totals - value * counts)
    if (number := len(sums)) < 2:
        return Estimate(value, math.nan, math.nan)
    error = math.sqrt(number / (number - 1) * float((sums**2).sum())) / float(counts.sum())
    return Estimate(value, value - _WIDTH * error, value + _WIDTH * error)


def _type_weights(samples: pd.DataFrame, kind: Mapping[str, Any]) -> pd.Series:
    """What each sample weighs in the headline: its type's share, dealt to the samples of the type."""
    types = kind.get("headline_types") or ()
    if not types:
        return pd.Series(1.0, samples.index)
    return samples.type.isin(types) / samples.groupby("type").type.transform("size")
