"""Two seeds decide nothing: by the simulated rates, which the table shows and a small simulation meets."""

import importlib.util
import json

import numpy as np
import pytest
from conftest import ROOT

from mgvq.analysis.statistics.compare import Comparison
from mgvq.analysis.statistics.leniency import ALPHA, RATES, is_lenient, null_rate, told_lenient
from mgvq.analysis.statistics.significance import p_value, paired_difference, two_way


def test_the_table_is_that_of_the_rates() -> None:
    spec = importlib.util.spec_from_file_location("simulate", ROOT / "experiments" / "simulate_null" / "simulate.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    assert (ROOT / "results/tables/null_simulation.md").read_text() == module.table(json.loads(RATES.read_text()))


def test_two_seeds_err_as_often_as_the_rates_say() -> None:
    rng = np.random.default_rng(0)
    d = rng.normal(0, 0.04, (4000, 2, 1)) + rng.normal(0, 0.2, (4000, 1, 250)) + rng.normal(0, 0.17, (4000, 2, 250))
    rate = null_rate(2)
    assert rate is not None
    assert (p_value(*two_way(d)) < ALPHA).mean() == pytest.approx(rate, abs=0.02)
    assert [is_lenient(seeds) for seeds in (1, 2, 3, 5, 8, 9)] == [False, True, False, False, False, False]
    assert f"{100 * rate:.1f} %" in told_lenient([1, 2, 5])
    assert told_lenient([1, 3, 5]) == ""


@pytest.mark.parametrize(("seeds", "decided", "suggestive"), [(1, True, False), (2, False, True), (3, True, False)])
def test_a_clear_difference_is_decided_by_three_seeds_and_suggested_by_two(seeds: int, decided: bool, suggestive: bool) -> None:
    d = np.full((seeds, 50), 1.0) + np.random.default_rng(0).normal(0, 0.1, (seeds, 50))
    effect = paired_difference(d)
    found = Comparison(effect=effect, p=effect.p, planned=True)
    assert found.p < ALPHA
    assert (found.is_decided, found.is_suggestive) == (decided, suggestive)
