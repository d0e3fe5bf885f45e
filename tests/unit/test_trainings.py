"""The table of trainings: planted variances are found, the interval covers, differences are paired."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mgvq.analysis.statistics.trainings import note, plain, printable, split, splits
from mgvq.analysis.statistics.verdict import verdict
from mgvq.errors import UserError
from mgvq.studies.spec import Study

PICTURES = 50
GRID = {"model": ["one", "other", "third"]}


def made_up() -> pd.DataFrame:
    """Losses of three trainings that differ by 1, of seeds that differ by .1; the arm costs .5 and .2 less than the baseline."""
    rng = np.random.default_rng(0)
    questions = rng.standard_normal(PICTURES)
    rows = []
    for number, name in enumerate(GRID["model"]):
        seeds = 0.1 * rng.standard_normal(4)
        for arm, losses in (("full", [0.0]), ("base", 0.7 + seeds), ("arm", 0.5 + seeds)):
            for seed, loss in enumerate(losses):
                values = 5 + number + loss + questions
                row = {"point": json.dumps({"model": name}), "arm": arm, "run": f"{name}{arm}{seed}", "overrides": ""}
                metrics = {
                    "rate": "full_precision" if arm == "full" else "uniform",
                    "flags": [],
                    "loss/answer": float(values.mean()),
                }
                metrics |= dict.fromkeys(
                    ("tiny_vqa/accuracy", "kl/full_precision", "bits/quantized_layers", "bits/model", "time/quantize_s",
                     "time/evaluate_s"), 1.0,
                )  # fmt: skip
                row |= {"seeds": [seed] if arm != "full" else [0, 1, 2, 3], "metrics": json.dumps(metrics)}
                rows.append(row | {"losses": values.tolist(), "scores": [True] * PICTURES})
    records = pd.DataFrame(rows).assign(num_samples=PICTURES)
    asked = {"type": ["count"] * PICTURES, "num_tokens": [1] * PICTURES, "picture": range(PICTURES)}
    told = {name: " ".join(map(str, words)) for name, words in asked.items()}
    records.attrs = {"baseline": "base", "baselines": ["base"], "primary": None, "trainings": "model", "questions": told}
    return records


def test_differences_are_taken_within_a_training_at_equal_seeds() -> None:
    found = {(other, arm): split for measure, other, arm, split in splits(made_up()) if measure == "loss"}
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
    header, *lines = printable(made_up())
    assert {len(line) for line in lines} == {len(header)}
    assert [line[:2] for line in lines].count(["loss - base", "arm"]) == 1
    assert len(lines) == 2 * 6
    assert "one, other, third" in note(made_up())
    assert plain(made_up()).count("\n") == 1 + 2 * 6


def test_the_verdict_says_whether_another_training_could_turn_it() -> None:
    records = made_up()
    records.attrs["primary"] = {"arm": "arm", "metric": "loss"}
    (said,) = [sentence for sentence in verdict(records) if "trained once more" in sentence]
    assert "the sign of arm - base is settled by 3 trainings: answer loss -0.200 nats a token [-0.200, -0.200]" in said
    turned = records.point.str.contains("third") & (records.arm == "arm")
    records["losses"] = [[x + 5 * t for x in losses] for losses, t in zip(records.losses, turned, strict=True)]
    assert any("is not settled by 3 trainings" in sentence for sentence in verdict(records))


@pytest.mark.parametrize("grid", [{"model": ["one"]}, {"model": ["one", "other"], "bits": [2, 3]}, {}])
def test_trainings_are_the_only_key_of_the_grid(grid: dict) -> None:
    with pytest.raises(UserError, match="trainings='model' must be the only key of the grid"):
        Study(name="s", question="?", arms={"a": []}, seeds=[0], grid=grid, trainings="model")
