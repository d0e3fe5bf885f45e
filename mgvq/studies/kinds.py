"""What the runs of a study answer, as plans and tables speak of it: questions about pictures, public benchmarks, or prose."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mgvq.data.tiny_vqa.questions import HEADLINE
from mgvq.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What plans and tables need to know of an evaluation."""

    evaluation: str
    """The dotted path of its class."""
    headline: str
    """The metric that is its result."""
    measures: tuple[str, ...]
    """By what arms are compared: names of `mgvq.analysis.statistics.measures`."""
    planned: tuple[str, ...]
    """What a study may plan (`primary.metric`)."""
    samples: str = "questions"
    """What it asks, in the plural."""
    clusters: str = "pictures"
    """Within which its samples are not independent, in the plural."""
    by_task: bool = False
    """The samples belong to tasks that count alike; each has a column in tables, with the metric `TASK/accuracy`."""
    headline_types: tuple[str, ...] = ()
    """The types of questions that make the headline accuracy, each with the same weight; empty: all questions count alike."""
    redraw: str | None = None
    """The dotted path of a function from a row of `samples.parquet` to the image of its question; None: there is none."""


PICTURES = Kind(
    evaluation="mgvq.evaluation.tiny_vqa.TinyVQA",
    headline="tiny_vqa/accuracy",
    measures=("accuracy", "loss"),
    planned=("accuracy", "loss"),
    headline_types=tuple(HEADLINE),
    redraw="mgvq.data.tiny_vqa.redraw.redraw",
)
BENCHMARKS = Kind(
    evaluation="mgvq.evaluation.suite.Suite",
    headline="suite/accuracy",
    measures=("accuracy",),
    planned=("accuracy",),
    by_task=True,
)
TEXT = Kind(
    evaluation="mgvq.evaluation.perplexity.Perplexity",
    headline="text/perplexity",
    measures=("loss",),
    planned=("loss", "perplexity"),
    samples="passages",
    clusters="topics",
)
KINDS = (PICTURES, BENCHMARKS, TEXT)


def kind_of_config(evaluation: Mapping[str, Any]) -> Kind | None:
    """Of a run's `evaluation` group; None for a class that no table knows."""
    return next((kind for kind in KINDS if kind.evaluation == evaluation.get("_target_")), None)


def kind_of_metrics(metrics: Mapping[str, Any]) -> Kind:
    """Of a run's metrics. Raises UserError where they are of an evaluation that no table knows."""
    for kind in KINDS:
        if kind.headline in metrics:
            return kind
    known = ", ".join(kind.headline for kind in KINDS)
    raise UserError(f"tables are of runs that measured one of {known}; here there are {', '.join(sorted(metrics)) or 'none'}.")
