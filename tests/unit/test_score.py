"""What the model card says of an evaluation."""

import math

import pandas as pd
import pytest

from mgvq.evaluation.means import clusters_of
from mgvq.runs.score import scores as scores_of
from mgvq.types import EvalResult

MEASURES = {"headline": "accuracy", "measures": ["accuracy"], "planned": ["accuracy"]}


def card(samples: pd.DataFrame, **kind: object) -> float:
    (score,) = scores_of(EvalResult(metrics={}, samples=samples), {"_declares_": {"kind": {**MEASURES, **kind}}})
    return score.model.value


def asked(column: str, numbers: dict[str, int], right: dict[str, float]) -> pd.DataFrame:
    """So many questions of each type, or task, all with the score of it."""
    of = [name for name, number in numbers.items() for _ in range(number)]
    ids, scores = [f"{i}-0" for i in range(len(of))], [right[name] for name in of]
    return pd.DataFrame({"sample_id": ids, column: of, "score": scores, "num_tokens": 1, "loss": 0.0})


@pytest.mark.parametrize(("column", "kind"), [("task", {"by_task": True}), ("type", {"headline_types": ["few", "many"]})])
def test_tasks_and_types_count_alike_whatever_their_number(column: str, kind: dict[str, object]) -> None:
    """Not one in ten, as all questions alike would have it."""
    samples = asked(column, {"few": 10, "many": 90}, {"few": 1.0, "many": 0.0})
    assert card(samples, **kind) == pytest.approx(0.5)
    assert card(samples) == pytest.approx(0.1)


def test_an_evaluation_without_losses_has_a_card() -> None:
    samples = asked("task", {"few": 10}, {"few": 0.5}).drop(columns=["num_tokens", "loss"])
    assert card(samples, by_task=True) == pytest.approx(0.5)


def test_passages_of_one_text_are_clusters_and_questions_about_one_image_are_not() -> None:
    ids = pd.Series([f"book-{i}" for i in range(4)])
    assert clusters_of(ids, "topics").nunique() == 4
    assert clusters_of(ids, "pictures").nunique() == 1
    assert clusters_of(pd.concat([ids, pd.Series(["other-0"])]), "topics").nunique() == 2


def test_a_type_outside_of_the_headline_may_have_no_number() -> None:
    samples = asked("type", {"counted": 4, "beside": 3}, {"counted": 0.75, "beside": math.nan})
    assert card(samples, headline_types=["counted"]) == pytest.approx(0.75)
