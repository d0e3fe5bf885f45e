"""What arms are compared by: where its values are in a record, what makes the metric of them, and its words, once for all."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from mgvq.evaluation.means import headline_weights
from mgvq.studies.kinds import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A metric that is a weighted sum of the values of all questions, so that differences of it can be tested."""

    name: str
    """Its name in a study file (`primary.metric`), in `Kind.measures` and in tables."""
    column: str
    """The values of the questions: `scores` or `losses` of a `RunRecord`."""
    weigh: Callable[[pd.DataFrame, Kind], np.ndarray]
    """The weights under which the sum of the values is the metric, from the questions of the record."""
    noun: str
    """What a sentence calls it."""
    unit: str
    """The unit of a difference, after `factor`."""
    scale: str
    """The unit of the metric itself, after `factor`."""
    factor: int
    """The number that the metric is multiplied by before it is shown."""
    decimals: int
    """How many digits are shown after the point."""
    better: str
    """`max` or `min`."""

    @property
    def in_words(self) -> str:
        """Name and unit of a difference, for notes."""
        return f"{self.name} in {self.unit}"

    def is_better(self, difference: float) -> bool:
        """Whether a difference of the metric to another's is a gain."""
        return difference > 0 if self.better == "max" else difference < 0

    def shown(self, value: float, more: int = 0) -> str:
        """A difference in the measure's unit, with its sign and `more` digits than usual."""
        return f"{value * self.factor:+.{self.decimals + more}f}"


def _headline_weights(asked: pd.DataFrame, kind: Kind) -> Float[np.ndarray, "questions"]:
    """Weights under which the sum of all scores is the headline accuracy."""
    return headline_weights(asked, kind.headline_types, by_task=kind.by_task)


def _token_weights(asked: pd.DataFrame, kind: Kind) -> Float[np.ndarray, "questions"]:
    """Weights under which the sum of all losses (each summed over its answer) is the loss of a token."""
    return np.full(len(asked), 1 / asked.num_tokens.sum())


ACCURACY = Measure(
    name="accuracy",
    column="scores",
    weigh=_headline_weights,
    noun="accuracy",
    unit="points",
    scale="%",
    factor=100,
    decimals=1,
    better="max",
)
LOSS = Measure(
    name="loss",
    column="losses",
    weigh=_token_weights,
    noun="answer loss",
    unit="nats a token",
    scale="nats a token",
    factor=1,
    decimals=3,
    better="min",
)
MEASURES = {measure.name: measure for measure in (ACCURACY, LOSS)}
# Perplexity is the exponential of the loss: what differs in the one differs in the other, and the loss is a mean over tokens.
TESTED_AS = {"perplexity": LOSS}


def measure_of(metric: str) -> Measure:
    """The measure by which a metric of a study file is tested."""
    return TESTED_AS.get(metric) or MEASURES[metric]


def noun_of(metric: str) -> str:
    """What a sentence calls a metric of a study file."""
    return MEASURES[metric].noun if metric in MEASURES else metric
