"""Studies that read text: perplexity in place of accuracy, tested by the loss, and arms that are run at some points alone."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import write_finished_run
from omegaconf import OmegaConf

from mgvq.analysis.html import write_html
from mgvq.analysis.records.collect import collect
from mgvq.analysis.records.layers import collect_layers
from mgvq.analysis.records.records import StudyRecord, write_record
from mgvq.analysis.report import write_figures
from mgvq.analysis.statistics.compare import compare, differences
from mgvq.analysis.statistics.forecast import detectable
from mgvq.analysis.statistics.measures import MEASURES
from mgvq.analysis.statistics.significance import paired_difference
from mgvq.analysis.tables.arms import arms_table
from mgvq.analysis.tables.render import markdown
from mgvq.analysis.tables.table import rows
from mgvq.analysis.verdict import verdict
from mgvq.errors import UserError
from mgvq.runs.places import conf_folder
from mgvq.runs.store import RunFolder
from mgvq.studies.plan import PlannedRun, expand
from mgvq.studies.spec import Study

TOPICS = ("assert", "assignment", "string-methods", "try", "types")
LOSS = {"full": 2.0, "base": 3.0, "better": 2.5, "late": 2.6}  # nats a token
STUDY = Study(
    name="made_up_text",
    question="which reads best?",
    arms={arm: [f"arm={arm}"] for arm in LOSS},
    seeds=[0, 1, 2],
    grid={"budget.bits_per_weight": [3.0, 2.0]},
    only={"late": {"budget.bits_per_weight": [2.0]}},
    baseline="base",
    primary={"arm": "late", "metric": "perplexity"},
)


def finish(folder: Path, arm: str, seed: int, bits: float) -> None:
    rng = np.random.default_rng([seed, *map(ord, arm), int(bits)])
    samples = pd.DataFrame({"sample_id": [f"{topic}-{i}" for topic in TOPICS for i in range(4)]})
    samples["type"] = samples.sample_id.str.rpartition("-")[0]
    samples["sample_hash"], samples["task"], samples["prediction"], samples["score"] = (
        samples.sample_id,
        "perplexity",
        "",
        math.nan,
    )
    samples["num_tokens"] = 200 + 3 * samples.index
    samples["loss"] = samples.num_tokens * (LOSS[arm] + 0.1 * rng.standard_normal(len(samples)))
    loss = samples.loss.sum() / samples.num_tokens.sum()
    metrics = {
        "text/perplexity": math.exp(loss),
        "loss/answer": loss,
        "kl/full_precision": loss - 2.0,
        "bits/quantized_layers": bits,
        "bits/model": bits + 2,
        "rate": "full_precision" if arm == "full" else "2x16",
    }
    write_finished_run(folder, samples, metrics)


def plan(results: Path) -> list[PlannedRun]:
    runs = []
    evaluation = {**OmegaConf.load(conf_folder() / "evaluation" / "perplexity.yaml"), "num_passages": 4 * len(TOPICS)}
    for point in STUDY.points():
        for arm in STUDY.arms_at(point):
            for seed in STUDY.seeds:
                folder = results / "runs" / f"{point['budget.bits_per_weight']}-{arm}-{seed}"
                if not folder.exists():
                    finish(folder, arm, seed, point["budget.bits_per_weight"])
                cfg = OmegaConf.create({"evaluation": evaluation})
                runs.append(PlannedRun(arm, point, seed, (f"arm={arm}",), RunFolder(folder), cfg))
    return runs


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def record(results: Path) -> StudyRecord:
    return collect(STUDY, plan(results))


def test_perplexity_stands_where_accuracy_would(record: StudyRecord) -> None:
    table = arms_table(record)
    header, lines = table.header, table.lines
    assert "perplexity" in header
    assert "accuracy %" not in header
    order = [("3.0", arm) for arm in ("full", "base", "better")] + [("2.0", arm) for arm in LOSS]
    assert [tuple(line[:2]) for line in lines] == order
    best = [lines[i][1] for i, column in sorted(table.bold) if header[column] == "perplexity"]
    assert best == ["better", "better"]  # the lowest, full precision apart
    assert "20 test passages" in markdown(arms_table(record))
    assert "3 seeds x 5 topics" in markdown(arms_table(record))
    assert "accuracy" not in arms_table(record).csv
    for row in rows(record):
        assert row.values["perplexity"] == pytest.approx(np.exp(row.values["loss"]))


def test_perplexity_is_compared_by_the_loss(record: StudyRecord) -> None:
    """Its planned comparison is the one that is not corrected."""
    found = compare(record)
    assert {measure for measure, *_ in found} == {"loss"}
    planned = {(point, arm): c for (_, point, arm), c in found.items() if c.planned}
    ((point, arm),) = planned
    assert (dict(point.values), arm) == ({"budget.bits_per_weight": 2.0}, "late")
    d = next(d for p, a, d in differences(record, MEASURES["loss"]) if (p, a) == (point, arm))
    assert planned[point, arm].effect == paired_difference(d)
    assert planned[point, arm].p == paired_difference(d).p
    assert d.shape == (3, len(TOPICS))
    assert record.questions.picture.nunique() == len(TOPICS)
    table = {(row.point.short["bits_per_weight"], row.arm): row for row in rows(record)}
    difference = table[2.0, "late"].mean("loss") - table[2.0, "base"].mean("loss")
    assert planned[point, arm].effect.mean == pytest.approx(difference, abs=1e-5)


def test_the_report_is_made_of_what_there_is(record: StudyRecord, results: Path) -> None:
    summary, *sentences = verdict(record)
    assert summary == "The planned comparison, late against base by perplexity: better than base on 1 of 1 grid points."
    assert "3 seeds x 5 topics" in sentences[0]
    write_figures("made_up_text", record, collect_layers(plan(results)), results)
    page = write_html(STUDY.name, STUDY, record, results).read_text()
    assert "Accuracy by type" not in page
    assert "better keeps most, perplexity 1" in verdict(record.against(None))[1]


def test_what_it_can_find_comes_from_its_own_record(record: StudyRecord, results: Path) -> None:
    runs = plan(results)
    assert "no study with its evaluation has a record" in detectable(STUDY, runs, results / "records")
    write_record(record, results / "records" / "made_up_text.parquet")
    told = detectable(STUDY, runs, results / "records")
    assert told.startswith("finds differences of 0.")
    assert "nats a token of answer loss with 80 % power (3 seeds x 5 topics" in told


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"only": {"base": {"budget.bits_per_weight": [2.0]}}}, "only names 'base'"),
        ({"only": {"nobody": {"budget.bits_per_weight": [2.0]}}}, "only names 'nobody'"),
        ({"only": {"late": {"budget.bits_per_weight": [4.0]}}}, r"\[4\.0\] are no values"),
        ({"only": {"late": {"scope": ["all"]}}}, "are no values"),
        ({"only": {"late": {"budget.bits_per_weight": []}}}, "are no values"),
        ({"seeds": [0, -1]}, "seeds must be whole numbers >= 0, got -1"),
        ({"primary": {"arm": "late", "metric": "bits"}}, "primary.metric must be one of accuracy, loss, perplexity"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(changes: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        replace(STUDY, **changes)


@pytest.mark.parametrize(("evaluation", "metric"), [("perplexity", "accuracy"), ("tiny_vqa", "perplexity")])
def test_the_planned_metric_is_one_that_is_measured(evaluation: str, metric: str) -> None:
    arms = {"rtn": ["method=rtn"], "kmeans": ["method=kmeans"]}
    common = [f"evaluation={evaluation}", *(["model=smollm2"] if evaluation == "perplexity" else [])]
    primary = {"arm": "kmeans", "metric": metric}
    with pytest.raises(UserError, match=f"primary.metric={metric} is nothing that its evaluation measures"):
        expand(Study(name="s", question="?", arms=arms, seeds=[0], common=common, baseline="rtn", primary=primary))
