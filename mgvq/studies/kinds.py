"""What the runs of a study answer, as plans and tables speak of it: questions about pictures, public benchmarks, or prose."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mgvq.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """The class of an `evaluation`; the metric that is its `headline`; the `measures` by which arms are compared; what a study
    may plan (`primary.metric`); its `samples`, and the `clusters` within which they are not independent."""

    evaluation: str
    headline: str
    measures: tuple[str, ...]
    planned: tuple[str, ...]
    samples: str = "questions"
    clusters: str = "pictures"


PICTURES = Kind(
    evaluation="mgvq.evaluation.tiny_vqa.TinyVQA",
    headline="tiny_vqa/accuracy",
    measures=("accuracy", "loss"),
    planned=("accuracy", "loss"),
)
BENCHMARKS = Kind(
    evaluation="mgvq.evaluation.suite.Suite", headline="suite/accuracy", measures=("accuracy",), planned=("accuracy",)
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
