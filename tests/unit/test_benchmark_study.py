"""Studies of public benchmarks: a column a task, compared by the accuracy in which every task counts alike."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT, write_finished_run
from omegaconf import OmegaConf

from mgvq.analysis.html import write_html
from mgvq.analysis.records.collect import collect
from mgvq.analysis.records.layers import collect_layers
from mgvq.analysis.records.records import StudyRecord, read_record, write_record
from mgvq.analysis.report import write_figures
from mgvq.analysis.statistics.compare import compare
from mgvq.analysis.statistics.forecast import detectable
from mgvq.analysis.statistics.significance import paired_difference
from mgvq.analysis.tables.arms import arms_table
from mgvq.analysis.tables.render import markdown
from mgvq.analysis.tables.table import rows
from mgvq.analysis.verdict import verdict
from mgvq.errors import UserError
from mgvq.evaluation.suite_metrics import averages, metrics
from mgvq.runs.places import conf_folder
from mgvq.runs.store import RunFolder
from mgvq.studies.kinds import kind_of_config, kind_of_metrics
from mgvq.studies.plan import PlannedRun, expand
from mgvq.studies.spec import Study, read_study

SKILL = {"full": 0.9, "base": 0.3, "better": 0.8}
PAPER = ROOT / "experiments" / "e14_paper_table2" / "study.yaml"
STUDY = Study(
    name="made_up_benchmarks",
    question="which answers best?",
    arms={arm: [f"arm={arm}"] for arm in SKILL},
    seeds=[0, 1, 2],
    grid={"model": ["one"]},
    baseline="base",
    primary={"arm": "better", "metric": "accuracy"},
)


def answers(arm: str, seed: int) -> pd.DataFrame:
    """80 choices of four about 40 pictures, some unreadable, and 20 questions of ten people's words, which give thirds."""
    rng = np.random.default_rng([seed, *map(ord, arm)])
    choices = pd.DataFrame({"task": "mmstar", "sample_id": [f"mmstar-{n // 2}-{n % 2}" for n in range(80)], "chance": 0.25})
    choices["parsed"] = rng.random(80) < 0.9
    choices["score"] = (choices.parsed & (rng.random(80) < SKILL[arm])).astype(float)
    choices["corrected"] = choices.score - (choices.parsed & (choices.score == 0)) / 3
    words = pd.DataFrame({"task": "vizwiz_vqa_val", "sample_id": [f"vizwiz_vqa_val-{n}-0" for n in range(20)], "chance": 0.0})
    words["parsed"], words["score"] = True, np.minimum(1, rng.binomial(4, SKILL[arm], 20) / 3)
    words["corrected"] = words.score
    return pd.concat([choices, words], ignore_index=True).assign(type="any", sample_hash=lambda frame: frame.sample_id)


def finish(folder: Path, arm: str, seed: int) -> None:
    samples = answers(arm, seed)
    found = averages(samples)
    for task, part in samples.groupby("task"):
        found |= {f"{task}/raw": 0.5, **metrics(str(task), part)}
    write_finished_run(folder, samples, found | {"rate": "full_precision" if arm == "full" else "2x16"})


def plan(results: Path) -> list[PlannedRun]:
    cfg = OmegaConf.create({"evaluation": OmegaConf.load(conf_folder() / "evaluation" / "suite.yaml")})
    runs = []
    for arm in STUDY.arms:
        for seed in STUDY.seeds:
            folder = results / "runs" / f"{arm}-{seed}"
            if not folder.exists():
                finish(folder, arm, seed)
            runs.append(PlannedRun(arm, {"model": "one"}, seed, (f"arm={arm}",), RunFolder(folder), cfg))
    return runs


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def record(results: Path) -> StudyRecord:
    """The record as its file keeps it."""
    path = results / "records" / "another.parquet"
    write_record(collect(STUDY, plan(results)), path)
    return read_record(path)


def test_every_task_has_a_column_and_their_mean_is_the_first(record: StudyRecord) -> None:
    table = arms_table(record)
    header, lines = table.header, table.lines
    assert header[:8] == [
        "arm", "accuracy %", "vs baseline", "p", "mmstar %", "vizwiz_vqa_val %", "corrected %", "unparsed %"
    ]  # fmt: skip
    assert not {"loss", "KL", "perplexity"} & set(header)
    for row, line in zip(rows(record), lines, strict=True):
        asked = pd.concat([answers(row.arm, seed) for seed in STUDY.seeds])
        task = {name: 100 * part.score.mean() for name, part in asked.groupby("task")}
        assert row.mean("mmstar %") == pytest.approx(task["mmstar"])
        assert row.mean("vizwiz_vqa_val %") == pytest.approx(task["vizwiz_vqa_val"])
        assert row.mean("accuracy %") == pytest.approx((task["mmstar"] + task["vizwiz_vqa_val"]) / 2)
        assert row.mean("unparsed %") == pytest.approx(50 * (1 - asked.parsed[asked.task == "mmstar"].mean()))
        assert line[1].startswith(f"{row.mean('accuracy %'):.1f} +- ")
        assert row.gap_closed is None
    assert [lines[i][0] for i, column in table.bold if column == 1] == ["better"]
    assert "a wrong choice of k costs 1/(k - 1)" in markdown(table)
    assert "loss" not in table.csv


def test_arms_are_compared_by_the_mean_over_tasks_on_shared_pictures(record: StudyRecord) -> None:
    """Against a table of differences made by hand: a picture's part of either task's mean."""
    found = compare(record)
    assert {(measure, arm) for measure, _, arm in found} == {("accuracy", "full"), ("accuracy", "better")}
    table = []
    for seed in STUDY.seeds:
        better, base = answers("better", seed), answers("base", seed)
        pairs = (better.score - base.score)[:80].to_numpy().reshape(40, 2).sum(1) / 80 / 2
        single = (better.score - base.score)[80:].to_numpy() / 20 / 2
        table.append(60 * np.concatenate([pairs, single]))
    expected = paired_difference(np.array(table))
    (comparison,) = [c for (_, _, arm), c in found.items() if arm == "better"]
    assert comparison.planned
    for name in ("mean", "low", "high", "p"):
        assert getattr(comparison.effect, name) == pytest.approx(getattr(expected, name), rel=1e-5)
    assert comparison.effect.num_samples == record.questions.picture.nunique() == 60


def test_the_report_is_made_of_accuracy(record: StudyRecord, results: Path) -> None:
    summary, sentence = verdict(record)
    assert summary == "The planned comparison, better against base by accuracy: better than base on 1 of 1 grid points."
    assert "3 seeds x 60 pictures" in sentence
    written = write_figures(STUDY.name, record, collect_layers(plan(results)), results)
    assert [path.name for path in written] == ["made_up_benchmarks_arms.svg"]
    assert "Accuracy by type" not in write_html(STUDY.name, STUDY, record, results).read_text()
    unplanned = replace(record, primary=None)
    assert "by accuracy 1 of 1 arms are better than base, 0 worse; the best is better: accuracy +" in verdict(unplanned)[1]


def test_what_it_can_find_comes_from_a_study_of_benchmarks(record: StudyRecord, results: Path, tmp_path: Path) -> None:
    write_record(read_record(ROOT / "results" / "records" / "e01_main.parquet"), tmp_path / "e01_main.parquet")
    assert "no study with its evaluation has a record" in detectable(STUDY, plan(results), tmp_path)
    told = detectable(STUDY, plan(results), results / "records")
    assert "points of accuracy with 80 % power (3 seeds x 60 pictures, Holm over 2 arms; spread of another)" in told


def test_the_papers_table_is_planned_from_the_folders_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    study = read_study(PAPER)
    small = replace(study, grid={"model": ["tiny_llava_onevision"]})
    with pytest.raises(UserError, match="MGVQ_BENCHMARKS"):
        expand(small)
    data = ROOT / "tests" / "data" / "calibration"
    for name, path in (("BENCHMARKS", "anywhere"), ("SHAREGPT4V", data / "sharegpt4v.json"), ("COCO", data)):
        monkeypatch.setenv(f"MGVQ_{name}", str(path))
    with pytest.raises(UserError, match="hf download llava-hf/llava-onevision-qwen2-7b-ov-hf"):
        expand(study)
    runs = expand(small)
    assert {run.arm for run in runs} == set(study.arms)
    assert {tuple(run.cfg.evaluation.tasks) for run in runs} == {
        ("mmmu_val", "seedbench", "ocrbench", "vizwiz_vqa_val", "scienceqa_img", "textvqa_val")
    }
    with pytest.raises(UserError, match=r"primary\.metric=loss is nothing that its evaluation measures; accuracy is"):
        expand(replace(small, primary={"arm": "mgvq", "metric": "loss"}))


@pytest.mark.parametrize("file", sorted((conf_folder() / "evaluation").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_evaluation_declares_its_kind(file: Path) -> None:
    """Records from before kinds were kept are told by their headline alone."""
    kind = kind_of_config(yaml.safe_load(file.read_text()))
    assert kind is not None
    assert kind_of_metrics({kind.headline: 0.5, "loss/answer": 1.0}) == kind
    assert set(kind.planned) >= set(kind.measures)
