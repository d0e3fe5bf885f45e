"""The table of spreads: planted standard deviations are found, and a study without spread is refused."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from mgvq.analysis.records.records import Cell, Point, RunRecord, StudyRecord
from mgvq.analysis.statistics.spread import spreads
from mgvq.analysis.tables.spread_table import spread_table
from mgvq.errors import UserError
from mgvq.studies.kinds import kind_of_metrics
from mgvq.studies.spec import Study

POINT = Point('{"model": "one"}')
PICTURES_KIND = kind_of_metrics({"tiny_vqa/accuracy": 0.5})

RUNS, PICTURES = 60, 100
PLANTED = {"part": 0.1, "everything": 0.2}  # sd of what a seed adds to every loss
OF_PICTURES, OF_BOTH = 1.0, 0.5


def made_up(runs: int = RUNS) -> StudyRecord:
    """One question of one token an image, its loss a sum of a seed's, an image's and their own normal draws."""
    rng = np.random.default_rng(0)
    images = OF_PICTURES * rng.standard_normal(PICTURES)
    cells = []
    for arm, sd in PLANTED.items():
        found = []
        for seed in range(runs):
            losses = 5 + sd * rng.standard_normal() + images + OF_BOTH * rng.standard_normal(PICTURES)
            found.append(run(seed, losses))
        cells.append(Cell(point=POINT, arm=arm, runs=tuple(found)))
    asked = pd.DataFrame({"type": ["count"] * PICTURES, "num_tokens": [1] * PICTURES, "picture": range(PICTURES)})
    return StudyRecord(cells=tuple(cells), kind=PICTURES_KIND, questions=asked, spread="everything")


def run(seed: int, losses: np.ndarray) -> RunRecord:
    metrics = {"tiny_vqa/accuracy": 0.5, "loss/answer": 5.0, "rate": "mixed", "flags": []}
    return RunRecord(
        run=str(seed), seeds=(seed,), overrides="", num_samples=PICTURES, samples="", metrics=metrics, identity="{}",
        scores=losses < 5, losses=losses,
    )  # fmt: skip


def test_planted_spreads_are_found() -> None:
    found = spreads(made_up())
    for arm, sd in PLANTED.items():
        spread = found["loss", POINT, arm]
        of_runs = np.hypot(sd, OF_BOTH / PICTURES**0.5)
        assert spread.runs == pytest.approx(of_runs, rel=0.25)  # sixty draws
        assert spread.low < spread.runs < spread.high
        assert spread.seeds == pytest.approx(sd, rel=0.3)
        assert spread.questions == pytest.approx(np.hypot(OF_PICTURES, OF_BOTH / RUNS**0.5) / PICTURES**0.5, rel=0.15)
        assert spread.num_runs == RUNS
    assert found["accuracy", POINT, "part"].seeds < found["accuracy", POINT, "everything"].seeds


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, covered, studies = np.random.default_rng(1), 0, 400
    record = made_up(4)
    for _ in range(studies):
        runs = tuple(run(seed, np.full(PICTURES, x)) for seed, x in enumerate(rng.standard_normal(4)))
        cell = replace(record.cells[0], runs=runs)
        spread = spreads(replace(record, cells=(cell,)))["loss", POINT, "part"]
        covered += spread.low < 1 < spread.high
    assert 0.92 <= covered / studies <= 0.98


def test_shares_are_of_the_whole() -> None:
    table = spread_table(made_up())
    share = list(table.header).index("loss: % of variance")
    assert [line[share] for line in table.lines if line[0] == "everything"] == ["100"]
    assert 10 < float(next(line[share] for line in table.lines if line[0] == "part")) < 50
    assert table.csv.count("\n") == 1 + 2 * len(PLANTED)


def test_an_arm_of_one_run_is_refused() -> None:
    with pytest.raises(UserError, match="one run for all seeds"):
        spreads(made_up(1))


def test_the_whole_must_be_an_arm() -> None:
    with pytest.raises(UserError, match="spread must be one of the arms a, b; got 'c'"):
        Study(name="s", question="?", arms={"a": ["method=rtn"], "b": ["method=kmeans"]}, seeds=[0, 1], spread="c")
