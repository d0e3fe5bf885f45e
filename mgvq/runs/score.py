"""What the model card says of an evaluation: each measure of the model, of full precision, and of the difference."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mgvq.checkpoint.card import Estimate, Score
from mgvq.evaluation.means import clusters_of, headline_weights
from mgvq.runs.declared import declared
from mgvq.types import EvalResult

_WIDTH = 1.96  # standard errors to either side of a mean hold it in 95 of 100 cases


def scores(result: EvalResult, evaluation: Mapping[str, Any]) -> list[Score]:
    """One for each of the measures that the evaluation declares and that has numbers; none for an evaluation that declares none.

    Every type of the evaluation's headline counts alike, or every task. Samples of one picture, or topic, are not independent:
    the intervals are those of a ratio of sums over pictures.
    """
    kind = declared(evaluation).get("kind", {})
    samples, clusters = result.samples, kind.get("clusters", "pictures")
    of_what = clusters_of(samples.sample_id, clusters)
    found = []
    for measure in kind.get("measures", ()):
        if measure == "accuracy":
            types, by_task = kind.get("headline_types") or (), bool(kind.get("by_task"))
            column, every = "score", headline_weights(samples, types, by_task=by_task)
        else:
            column, every = "loss", samples.num_tokens  # a column that evaluations without losses lack
        counted = np.asarray(every > 0)  # what has no part in the measure may have no number either
        counts, of_these = np.asarray(every)[counted], of_what.loc[counted]
        each = counts if measure == "accuracy" else 1
        values = np.asarray(samples[column])[counted] * each
        if not counted.any() or not np.isfinite(values).all():
            continue
        both = None
        if result.reference is not None:
            other = np.asarray(result.reference[column])[counted] * each
            both = estimate(other, counts, of_these), estimate(values - other, counts, of_these)
        name = f"{measure}, nats a token" if measure == "loss" else measure
        number = f"{len(values)} {kind.get('samples', 'questions')} of {of_these.nunique()} {clusters}"
        found.append(Score(name, number, estimate(values, counts, of_these), *(both or (None, None))))
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
