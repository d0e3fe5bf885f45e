"""Every arm against the study's baseline, at every point of its grid: accuracy and answer loss, with intervals and p values."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from mgvq.analysis.records.records import questions, values_by_seed
from mgvq.analysis.statistics.significance import Effect, holm, paired_difference, reweighted
from mgvq.data.tiny_vqa.questions import HEADLINE
from mgvq.studies.kinds import Kind, kind_from, kind_of_metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """An arm minus the baseline. `p` is adjusted for the other arms of the point, unless the comparison was `planned`."""

    effect: Effect
    p: float
    planned: bool


def headline_weights(asked: pd.DataFrame) -> Float[np.ndarray, "questions"]:
    """Weights under which the sum of all scores is the headline accuracy: headline types alike, questions of a type alike.

    Where they belong to tasks: tasks alike, questions of a task alike. Where no type is one of the headline: all alike.
    """
    if "task" not in asked and not set(asked.type) & set(HEADLINE):
        return np.full(len(asked), 1 / len(asked))
    label, worth = (asked.task, dict.fromkeys(asked.task, 1)) if "task" in asked else (asked.type, HEADLINE)
    counts = label.map(label.value_counts())
    weights = label.map(worth).fillna(0).to_numpy(float)
    total = sum(weight for kind, weight in worth.items() if kind in set(label))
    return weights / counts.to_numpy(float) / max(total, 1)


def token_weights(asked: pd.DataFrame) -> Float[np.ndarray, "questions"]:
    """Weights under which the sum of all losses (each summed over its answer) is the loss of a token."""
    return np.full(len(asked), 1 / asked.num_tokens.sum())


# Metric of a study file -> where its values are, and what makes the metric of them.
MEASURES: dict[str, tuple[str, Callable[[pd.DataFrame], np.ndarray]]] = {
    "accuracy": ("scores", headline_weights),
    "loss": ("losses", token_weights),
}
# Perplexity is the exponential of the loss: what differs in the one differs in the other, and the loss is a mean over tokens.
TESTED_AS = {"perplexity": "loss"}


def kind_of(records: pd.DataFrame) -> Kind:
    """What the runs answered, all of them the same. Older records do not say it."""
    if (kind := records.attrs.get("kind")) is not None:
        return kind_from(kind)
    return kind_of_metrics(json.loads(records.metrics.iloc[0]))


def differences(records: pd.DataFrame, measure: str) -> Iterator[tuple[str, str, Float[np.ndarray, "seeds pictures"]]]:
    """Grid point (JSON text), arm, and its differences to the baseline, their mean that of the metric. The baseline has none."""
    column, weigh = MEASURES[measure]
    asked, baseline = questions(records), records.attrs["baseline"]
    weights, pictures = weigh(asked), asked.picture.to_numpy()
    for point, rows in records.groupby("point", sort=False):
        values = {arm: values_by_seed(part, column) for arm, part in rows.groupby("arm", sort=False)}
        for arm in values:
            if arm != baseline:
                yield str(point), str(arm), reweighted(values[arm] - values[baseline], weights, pictures)


def compare(records: pd.DataFrame) -> dict[tuple[str, str, str], Comparison]:
    """By measure, grid point (JSON text) and arm. Nothing where the study has no baseline."""
    if records.attrs.get("baseline") is None:
        return {}
    found: dict[tuple[str, str, str], Comparison] = {}
    primary = records.attrs["primary"] or {"arm": None, "metric": ""}
    primary = {**primary, "metric": TESTED_AS.get(primary["metric"], primary["metric"])}
    for measure in kind_of(records).measures:
        effects = {(point, arm): paired_difference(d) for point, arm, d in differences(records, measure)}
        for point in records.point.unique():
            arms = [arm for at, arm in effects if at == point]
            planned = np.array([primary == {"arm": arm, "metric": measure} for arm in arms])
            plain = np.array([effects[point, arm].p for arm in arms])
            p = np.where(planned, plain, holm(np.where(planned, np.nan, plain)))
            for arm, value, was_planned in zip(arms, p, planned, strict=True):
                found[measure, point, arm] = Comparison(effect=effects[point, arm], p=float(value), planned=bool(was_planned))
    return found
