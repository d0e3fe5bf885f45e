"""What the runs of a study answer, as plans and tables speak of it: questions about images, public benchmarks, prose.

An evaluation declares its kind in its yaml (`_declares_: {kind: {headline: ..., ...}}`, see `mgvq.runs.declared`).
"""

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import yaml

from mgvq.errors import UserError
from mgvq.runs.declared import KEY, declared
from mgvq.runs.places import conf_folder

Measure = Literal["accuracy", "loss"]  # by which arms can be compared
Planned = Literal["accuracy", "loss", "perplexity"]  # what a primary comparison may be about


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """The kind of an evaluation. Raises UserError for measures that tables do not know."""

    headline: str
    """The metric that stands for the whole; runs that have it are of this kind."""

    measures: tuple[Measure, ...]
    """What arms are compared by: `accuracy`, the samples' `score`, and `loss`, their `loss` by `num_tokens`."""

    planned: tuple[Planned, ...]
    """What a study may plan as its `primary.metric`; a perplexity is tested by its loss."""

    samples: str = "questions"
    """The word for the samples of the evaluation."""

    clusters: str = "pictures"
    """The word for what samples belong to that are not independent: samples whose ids differ in their last part alone.
    Of `topics`, the passages of one text alone are independent (`clusters_of`)."""

    number: str | None = None
    """The setting that says how many samples there are; None where no setting does."""

    by_task: bool = False
    """The samples belong to tasks that count alike; each has a column in tables, with the metric `TASK/accuracy`."""

    headline_types: tuple[str, ...] = ()
    """The types of questions that make the headline accuracy, each with the same weight; empty: all questions count alike."""

    redraw: str | None = None
    """The dotted path of a function from a row of `samples.parquet` to the image of its question, an array, or None where that
    image is no longer known; None where the evaluation has no such function."""

    def __post_init__(self) -> None:
        for name, words in (("measures", get_args(Measure)), ("planned", get_args(Planned))):
            if unknown := sorted(set(getattr(self, name)) - set(words)):
                raise UserError(f"{KEY}.kind.{name} of {self.headline} has {', '.join(unknown)}; there are {', '.join(words)}.")

    def settings(self) -> dict[str, Any]:
        """The fields as a record keeps them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def kind_of_config(evaluation: Mapping[str, Any]) -> Kind | None:
    """The kind that a run's `evaluation` group declares; None where it declares none, so that no table can be made of it."""
    found = declared(evaluation).get("kind")
    return kind_from(found) if found is not None else None


def kind_from(settings: Mapping[str, Any]) -> Kind:
    """Raises UserError for settings that are not those of a kind."""
    lists = {name: tuple(value) for name, value in settings.items() if name in ("measures", "planned", "headline_types")}
    try:
        return Kind(**{**settings, **lists})
    except TypeError as error:
        raise UserError(f"{KEY}.kind is {dict(settings)}, which is not the kind of an evaluation: {error}") from error


def kind_of_metrics(metrics: Mapping[str, Any]) -> Kind:
    """The kind of the evaluation in `conf/` whose headline is among a run's metrics, for records that do not say their kind.

    Raises UserError where there is none.
    """
    for kind in _known():
        if kind.headline in metrics:
            return kind
    known = ", ".join(kind.headline for kind in _known())
    raise UserError(f"tables are of runs that measured one of {known}; here there are {', '.join(sorted(metrics)) or 'none'}.")


@functools.cache
def _known() -> tuple[Kind, ...]:
    """The kinds of the evaluations in `conf/`."""
    found = (
        kind_of_config(yaml.safe_load(file.read_text(encoding="utf-8")))
        for file in sorted((conf_folder() / "evaluation").glob("*.yaml"))
    )
    return tuple(kind for kind in found if kind)
