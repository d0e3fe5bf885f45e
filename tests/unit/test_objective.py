"""What a run gives back to a sweeper: names are checked before a run, and the way to search."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import run_command
from omegaconf import OmegaConf

from mgvq.errors import SharedFault, UserError
from mgvq.runs.objective import OF_EVERY_RUN, check_objective, objective
from mgvq.runs.places import conf_folder

EVALUATION = OmegaConf.load(conf_folder() / "evaluation" / "tiny_vqa.yaml")


def cfg(value: object, evaluation: object = EVALUATION):
    return OmegaConf.create({"objective": value, "evaluation": evaluation})


def test_one_metric_several_or_none() -> None:
    metrics = {"loss/answer": 0.5, "bits/model": 3.0, "kl/full_precision": None, "rate": "2x16"}
    assert objective(cfg(None), metrics) is None
    assert objective(cfg("loss/answer"), metrics) == 0.5
    assert objective(cfg(["bits/model", "loss/answer"]), metrics) == [3.0, 0.5]
    for name, told in {"kl/full_precision": "not finite", "rate": "not measured; there are bits/model, loss/answer"}.items():
        with pytest.raises(UserError, match=told):
            objective(cfg(name), metrics)


@pytest.mark.parametrize(
    ("value", "sweeper", "told"),
    [
        ("loss/answr", {}, r"measures no such thing; there are tiny_vqa/accuracy \(maximize\)"),
        (None, {"direction": "minimize"}, "give objective=NAME"),
        ("tiny_vqa/accuracy", {"direction": "minimize"}, "give 'hydra.sweeper.direction=maximize'"),
        (["loss/answer", "tiny_vqa/accuracy"], {"direction": ["minimize", "minimize"]}, r"direction=\[minimize,maximize\]"),
        (["loss/answer"], {"direction": ["minimize", "minimize"]}, "a direction for each"),
        (3, {}, "must be the name of a metric"),
        ([], {}, "must be the name of a metric"),
    ],
)
def test_a_search_for_nothing_or_the_wrong_way_is_refused(value: object, sweeper: dict, told: str) -> None:
    with pytest.raises(SharedFault, match=told):
        check_objective(cfg(value), OmegaConf.create(sweeper))


def test_what_can_be_measured_is_believed() -> None:
    check_objective(cfg(None), {})
    check_objective(cfg("tiny_vqa/accuracy/count"), OmegaConf.create({"direction": "maximize"}))
    check_objective(cfg("riddles/accuracy", {"_target_": "theirs"}), OmegaConf.create({"direction": "maximize"}))
    for file in (conf_folder() / "evaluation").glob("*.yaml"):
        assert set(yaml.safe_load(file.read_text())["_declares_"]["metrics"].values()) <= {"min", "max"}


@pytest.mark.skipif(find_spec("hydra_plugins.hydra_optuna_sweeper") is None, reason="pip install 'mgvq[optuna]'")
def test_optuna_finds_the_best_and_the_run_measures_what_is_declared(tmp_path: Path) -> None:
    import json

    words = ("model=tiny_internvl", "scope=language_projector", "evaluation.num_questions=26", "evaluation.answers=forced")
    search = ("-m", "hydra/sweeper=mgvq_optuna", "hydra.sweeper.n_trials=2", "objective=loss/answer", "method=rtn")
    run_command("mgvq.cli.run", *search, *words, "budget.bits_per_weight=2,4", results=tmp_path)
    best = yaml.safe_load((tmp_path / "multirun" / "optimization_results.yaml").read_text())
    measured = [json.loads(file.read_text()) for file in tmp_path.glob("runs/*/metrics.json")]
    assert best["best_value"] == min(metrics["loss/answer"] for metrics in measured)
    known = cfg(None).evaluation["_declares_"]["metrics"]
    numbers = {name for name, value in measured[0].items() if isinstance(value, float)}
    assert {name for name in numbers if not name.startswith("tiny_vqa/accuracy/")} <= {*known, *OF_EVERY_RUN}
