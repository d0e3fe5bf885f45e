"""The table of trainings: planted variances are found, the interval covers, differences are paired."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mgvq.analysis.records.records import Cell, Point, RunRecord, StudyRecord
from mgvq.analysis.statistics.measures import LOSS
from mgvq.analysis.statistics.trainings import split, splits
from mgvq.analysis.tables.trainings_table import trainings_table
from mgvq.analysis.verdict import verdict
from mgvq.errors import UserError
from mgvq.studies.kinds import kind_of_metrics
from mgvq.studies.spec import Study

PICTURES = 50
GRID = {"model": ["one", "other", "third"]}


def made_up(turned: float = 0.0) -> StudyRecord:
    """Losses of three trainings that differ by 1, of seeds that differ by .1; the arm costs .5 and .2 less than the baseline.

    `turned` is what the arm costs more in the third training.
    """
    rng = np.random.default_rng(0)
    questions = rng.standard_normal(PICTURES)
    cells = []
    for number, name in enumerate(GRID["model"]):
        seeds = 0.1 * rng.standard_normal(4)
        for arm, losses in (("full", [0.0]), ("base", 0.7 + seeds), ("arm", 0.5 + seeds + turned * (number == 2))):
            of_arm = {seed: 5 + number + loss + questions for seed, loss in enumerate(losses)}
            runs = [run(f"{name}{arm}{seed}", arm, (seed,) if arm != "full" else (0, 1, 2, 3), v) for seed, v in of_arm.items()]
            cells.append(Cell(point=Point(json.dumps({"model": name})), arm=arm, runs=tuple(runs)))
    asked = pd.DataFrame({"type": ["count"] * PICTURES, "num_tokens": [1] * PICTURES, "picture": range(PICTURES)})
    kind = kind_of_metrics(cells[0].runs[0].metrics)
    return StudyRecord(cells=tuple(cells), kind=kind, questions=asked, baseline="base", baselines=("base",), trainings="model")


def run(name: str, arm: str, seeds: tuple[int, ...], losses: np.ndarray) -> RunRecord:
    metrics = {"rate": "full_precision" if arm == "full" else "uniform", "flags": [], "loss/answer": float(losses.mean())}
    others = (
        "tiny_vqa/accuracy",
        "kl/full_precision",
        "bits/quantized_layers",
        "bits/model",
        "time/quantize_s",
        "time/evaluate_s",
    )
    return RunRecord(
        run=name, seeds=seeds, overrides="", num_samples=PICTURES, samples="", metrics=metrics | dict.fromkeys(others, 1.0),
        identity="{}", scores=np.ones(PICTURES, bool), losses=losses,
    )  # fmt: skip


def test_differences_are_taken_within_a_training_at_equal_seeds() -> None:
    found = {(figure.minus, figure.arm): figure.split for figure in splits(made_up()) if figure.measure is LOSS}
    assert list(found) == [("", "full"), ("", "base"), ("", "arm"), ("full", "base"), ("full", "arm"), ("base", "arm")]
    margin = found["base", "arm"]
    assert margin.means == pytest.approx([-0.2] * 3)
    assert margin.low == pytest.approx(margin.high)
    assert found["full", "arm"].trainings < 0.2, "that the trainings differ is no part of what quantising costs"
    itself = found["", "arm"]
    assert itself.trainings == pytest.approx(1, rel=0.2)
    assert itself.seeds == pytest.approx(0.1, rel=0.6)
    assert (itself.share or 0) > 0.9
    assert itself.p == pytest.approx(0, abs=1e-6)
    assert found["", "full"].seeds is None
    assert found["", "full"].trainings == pytest.approx(1)


def test_planted_variances_are_found_and_the_interval_covers() -> None:
    rng, of_training, of_seed, covered, found = np.random.default_rng(0), 2.0, 1.0, 0, []
    for _ in range(2000):
        values = 3 + of_training * rng.standard_normal((3, 1)) + of_seed * rng.standard_normal((3, 5))
        found.append(split(values))
        covered += found[-1].low < 3 < found[-1].high
    assert 0.94 <= covered / len(found) <= 0.96
    assert np.mean([s.trainings**2 for s in found]) == pytest.approx(of_training**2, rel=0.06)
    assert np.mean([(s.seeds or 0) ** 2 for s in found]) == pytest.approx(of_seed**2, rel=0.03)


def test_the_p_value_is_that_of_the_one_way_analysis() -> None:
    values = np.random.default_rng(1).standard_normal((4, 6))
    assert split(values).p == pytest.approx(stats.f_oneway(*values).pvalue)


def test_without_any_spread() -> None:
    same = split(np.ones((2, 3)))
    assert (same.trainings, same.seeds, same.share, same.p, same.low, same.high) == (0, 0, 0, 1, 1, 1)
    with pytest.raises(ValueError, match="one training"):
        split(np.ones((1, 3)))


def test_the_pages_show_every_figure_once() -> None:
    table = trainings_table(made_up())
    assert {len(line) for line in table.lines} == {len(table.header)}
    assert [line[:2] for line in table.lines].count(["loss - base", "arm"]) == 1
    assert len(table.lines) == 2 * 6
    assert "one, other, third" in table.note
    assert table.csv.count("\n") == 1 + 2 * 6


def test_the_verdict_says_whether_another_training_could_turn_it() -> None:
    planned = {"arm": "arm", "metric": "loss"}
    (said,) = [sentence for sentence in verdict(replace(made_up(), primary=planned)) if "trained once more" in sentence]
    assert "the sign of arm - base is settled by 3 trainings: answer loss -0.200 nats a token [-0.200, -0.200]" in said
    assert any("is not settled by 3 trainings" in sentence for sentence in verdict(replace(made_up(5.0), primary=planned)))


@pytest.mark.parametrize("grid", [{"model": ["one"]}, {"model": ["one", "other"], "bits": [2, 3]}, {}])
def test_trainings_are_the_only_key_of_the_grid(grid: dict) -> None:
    with pytest.raises(UserError, match="trainings='model' must be the only key of the grid"):
        Study(name="s", question="?", arms={"a": []}, seeds=[0], grid=grid, trainings="model")
