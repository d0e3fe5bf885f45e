"""A quick pass narrows a study or changes a setting of all its runs, under a name of its own."""

from dataclasses import replace

import pytest

from mgvq.errors import UserError
from mgvq.studies.plan import expand
from mgvq.studies.quick import quick_pass, told_quick
from mgvq.studies.spec import Study

STUDY = Study(
    name="x",
    question="?",
    common=["evaluation.num_questions=1000"],
    arms={"two": ["method=kmeans"], "three": ["method=kmeans", "budget.bits_per_weight=3"]},
    grid={"model": ["tiny_internvl", "tiny_smolvlm"]},
    seeds=[0, 1, 2],
    baseline="two",
)


def test_settings_win_over_the_studys_and_seeds_and_grid_are_narrowed() -> None:
    study, words = quick_pass(STUDY, ["evaluation.num_questions=8", "seed=0,1", "model=tiny_smolvlm"])
    assert (study.name, study.seeds, study.grid) == ("x_quick", [0, 1], {"model": ["tiny_smolvlm"]})
    runs = expand(study, last=words)
    assert len(runs) == 4
    assert {run.cfg.evaluation.num_questions for run in runs} == {8}
    assert not {run.folder.path for run in runs} & {run.folder.path for run in expand(STUDY)}
    assert "not the results of that study" in told_quick(study, words)


def test_without_a_setting_that_counts_the_runs_are_the_studys() -> None:
    study, words = quick_pass(STUDY, ["seed=1"])
    assert {run.folder.path for run in expand(study, last=words)} < {run.folder.path for run in expand(STUDY)}


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("budget.bits_per_weight=4", "arms of study x differ in budget.bits_per_weight"),
        ("method=rtn", "arms of study x differ in method"),
        ("scope=all,language", "has one value of scope"),
        ("scope", "is no setting"),
        ("dry=true", "dry=true runs nothing"),
        ("model=glob(tiny_*)", "takes no glob; give the values, as in model=a,b"),
        ("seed=-1", "seeds must be whole numbers"),
    ],
)
def test_what_would_make_arms_alike_is_refused(word: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        quick_pass(STUDY, [word])


def test_arms_that_are_run_elsewhere_alone_are_left_out() -> None:
    study = replace(STUDY, only={"three": {"model": ["tiny_internvl"]}}, primary={"arm": "three", "metric": "loss"})
    narrowed, _ = quick_pass(study, ["model=tiny_smolvlm"])
    assert (list(narrowed.arms), narrowed.primary, narrowed.only) == (["two"], None, {})
