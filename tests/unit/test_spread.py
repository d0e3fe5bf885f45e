"""The table of spreads: planted standard deviations are found, and a study without spread is refused."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mgvq.analysis.statistics.spread import plain, printable, spreads
from mgvq.errors import UserError
from mgvq.studies.spec import Study

RUNS, PICTURES = 60, 100
PLANTED = {"part": 0.1, "everything": 0.2}  # sd of what a seed adds to every loss
OF_PICTURES, OF_BOTH = 1.0, 0.5


def made_up(runs: int = RUNS) -> pd.DataFrame:
    """One question of one token a picture, its loss a sum of a seed's, a picture's and their own normal draws."""
    rng = np.random.default_rng(0)
    pictures = OF_PICTURES * rng.standard_normal(PICTURES)
    rows: list[dict[str, Any]] = []
    for arm, sd in PLANTED.items():
        for seed in range(runs):
            losses = 5 + sd * rng.standard_normal() + pictures + OF_BOTH * rng.standard_normal(PICTURES)
            scores = (losses < 5).tolist()
            rows.append(
                {"point": json.dumps({"model": "one"}), "arm": arm, "seeds": [seed], "losses": losses.tolist(), "scores": scores}
            )
    records = pd.DataFrame(rows).assign(num_samples=PICTURES, metrics='{"tiny_vqa/accuracy": 0.5, "loss/answer": 5.0}')
    asked = {"type": ["count"] * PICTURES, "num_tokens": [1] * PICTURES, "picture": range(PICTURES)}
    records.attrs = {"spread": "everything", "questions": {name: " ".join(map(str, words)) for name, words in asked.items()}}
    return records


def test_planted_spreads_are_found() -> None:
    found = spreads(made_up())
    for arm, sd in PLANTED.items():
        spread = found["loss", '{"model": "one"}', arm]
        of_runs = np.hypot(sd, OF_BOTH / PICTURES**0.5)
        assert spread.runs == pytest.approx(of_runs, rel=0.25)  # sixty draws
        assert spread.low < spread.runs < spread.high
        assert spread.seeds == pytest.approx(sd, rel=0.3)
        assert spread.questions == pytest.approx(np.hypot(OF_PICTURES, OF_BOTH / RUNS**0.5) / PICTURES**0.5, rel=0.15)
        assert spread.num_runs == RUNS
    assert found["accuracy", '{"model": "one"}', "part"].seeds < found["accuracy", '{"model": "one"}', "everything"].seeds


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, covered, studies = np.random.default_rng(1), 0, 400
    records = made_up(4).iloc[:4]
    for _ in range(studies):
        records["losses"] = [[x] * PICTURES for x in rng.standard_normal(4)]
        spread = spreads(records)["loss", '{"model": "one"}', "part"]
        covered += spread.low < 1 < spread.high
    assert 0.92 <= covered / studies <= 0.98


def test_shares_are_of_the_whole() -> None:
    records = made_up()
    header, *rows = printable(records)
    share = header.index("loss: % of variance")
    assert [row[share] for row in rows if row[0] == "everything"] == ["100"]
    assert 10 < float(next(row[share] for row in rows if row[0] == "part")) < 50
    assert plain(records).count("\n") == 1 + 2 * len(PLANTED)


def test_an_arm_of_one_run_is_refused() -> None:
    with pytest.raises(UserError, match="one run for all seeds"):
        spreads(made_up(1))


def test_the_whole_must_be_an_arm() -> None:
    with pytest.raises(UserError, match="spread must be one of the arms a, b; got 'c'"):
        Study(name="s", question="?", arms={"a": ["seed=0"], "b": ["seed=0"]}, seeds=[0, 1], spread="c")
