"""From run folders to a study's record, comparisons and tables, on made-up runs whose numbers can be followed."""

import csv
import io
import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import declare_done, write_finished_run
from omegaconf import OmegaConf

from mgvq.analysis.records.collect import collect
from mgvq.analysis.records.records import StudyRecord, read_record, write_record
from mgvq.analysis.report import write_tables
from mgvq.analysis.statistics.compare import compare
from mgvq.analysis.statistics.forecast import detectable, predicted_seconds
from mgvq.analysis.statistics.significance import holm
from mgvq.analysis.tables.arms import arms_table
from mgvq.analysis.tables.render import latex, markdown
from mgvq.analysis.tables.table import rows
from mgvq.errors import UserError
from mgvq.runs.overrides import key_of
from mgvq.runs.places import conf_folder
from mgvq.runs.store import RunFolder
from mgvq.studies.plan import PlannedRun
from mgvq.studies.spec import Study

TYPES = ("count", "count", "digit", "color")  # of the questions of a picture; color is no headline type
HEADLINE = ("count", "digit")
NUM_PICTURES = 30
EVALUATION = OmegaConf.load(conf_folder() / "evaluation" / "tiny_vqa.yaml")
SKILL = {"full": 0.95, "base": 0.5, "better": 0.8, "alike": 0.5, "fixed": 0.6}  # share of right answers
STUDY = Study(
    name="made_up",
    question="which is better?",
    arms={arm: [f"arm={arm}"] for arm in SKILL},
    seeds=[0, 1, 2],
    grid={"model": ["one", "two"], "scope": ["all"]},
    baseline="base",
    primary={"arm": "alike", "metric": "loss"},
)


def finish(folder: Path, arm: str, seed: int, model: str, picture_seed: int = 0) -> None:
    """A finished run: the easier a question and the better the arm, the likelier the right answer and the smaller the loss."""
    rng = np.random.default_rng([seed, *map(ord, arm + model)])
    samples = pd.DataFrame({"type": TYPES * NUM_PICTURES, "num_tokens": [2, 2, 3, 4] * NUM_PICTURES})
    samples["sample_id"] = [f"test-{picture_seed}-{i // 4}-{i % 4}" for i in samples.index]
    samples["sample_hash"] = samples.sample_id
    samples["score"] = (rng.random(len(samples)) < SKILL[arm]).astype(float)
    samples["loss"] = samples.num_tokens * (1 - SKILL[arm]) * rng.random(len(samples))
    metrics = {
        "tiny_vqa/accuracy": samples.groupby("type").score.mean()[list(HEADLINE)].mean(),
        "loss/answer": samples.loss.sum() / samples.num_tokens.sum(),
        "kl/full_precision": 0.1,
        "rate": "full_precision" if arm == "full" else "2x16",
        "flags": ["empty_cluster"] if arm == "better" else [],
    }
    write_finished_run(folder, samples, metrics)


def plan(results: Path, study: Study = STUDY, done: bool = True) -> list[PlannedRun]:
    """What `expand` gives: `full` and `fixed` are one run for all seeds."""
    runs = []
    for point in study.points():
        for arm in study.arms:
            for seed in study.seeds:
                number = 0 if arm in ("full", "fixed") else seed
                folder = results / "runs" / f"{point['model']}-{arm}-{number}"
                if done and not folder.exists():
                    finish(folder, arm, number, point["model"])
                overrides = (f"model={point['model']}", f"arm={arm}", "list=[1, 2]", f"seed={seed}")
                cfg = OmegaConf.create({"evaluation": {**EVALUATION, "num_questions": 4 * NUM_PICTURES}})
                runs.append(PlannedRun(arm, point, seed, overrides, RunFolder(folder), cfg))
    return runs


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> StudyRecord:
    return collect(STUDY, plan(tmp_path_factory.mktemp("results")))


def test_a_record_keeps_what_the_tables_need(record: StudyRecord, tmp_path: Path) -> None:
    write_record(record, tmp_path / "records" / "made_up.parquet")
    back = read_record(tmp_path / "records" / "made_up.parquet")
    kept = ("kind", "baseline", "baselines", "primary", "spread", "trainings", "arms", "points")
    assert [getattr(back, name) for name in kept] == [getattr(record, name) for name in kept]
    assert list(back.questions.type) == list(TYPES) * NUM_PICTURES
    assert list(back.questions.picture) == [i // 4 for i in range(4 * NUM_PICTURES)]
    assert len(back.runs) == 2 * (3 + 3 + 3 + 1 + 1)
    assert {run.seeds for cell in back.cells for run in cell.runs if cell.arm == "full"} == {(0, 1, 2)}
    assert markdown(arms_table(back)) == markdown(arms_table(record))
    written = write_tables("made_up", back, tmp_path)
    assert {path.name for path in written} == {"made_up.md", "made_up.csv", "made_up.tex", "made_up_verdict.md"}
    assert (tmp_path / "tables" / "made_up.md").read_text() == markdown(arms_table(record))


def test_runs_that_answered_different_questions_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "two-base-2"
    finish(folder, "base", 2, "two", picture_seed=1)
    with pytest.raises(UserError, match="different test questions"):
        collect(STUDY, plan(tmp_path))


def test_differences_are_those_of_the_metrics(record: StudyRecord) -> None:
    """Headline and loss a token are no plain means over questions; the differences are theirs, to the rounding of the losses."""
    table = {(row.point.short["model"], row.arm): row for row in rows(record)}
    for (model, arm), row in table.items():
        assert bool(row.comparisons) == (arm != "base")
        for name, found in row.comparisons.items():
            factor = 100 if name == "accuracy %" else 1
            assert factor * found.effect.mean == pytest.approx(row.mean(name) - table[model, "base"].mean(name), abs=5e-4)
            assert found.effect.num_seeds == 3  # those of the baseline, where the arm has one run


def test_holm_runs_over_the_arms_of_a_point_and_leaves_the_planned_comparison_alone(record: StudyRecord) -> None:
    found = compare(record)
    for point in record.points:
        for measure in ("accuracy", "loss"):
            others = [arm for arm in SKILL if arm != "base"]
            family = [arm for arm in others if (arm, measure) != ("alike", "loss")]
            plain_p = np.array([found[measure, point, arm].effect.p for arm in family])
            assert [found[measure, point, arm].p for arm in family] == pytest.approx(holm(plain_p))
        planned = found["loss", point, "alike"]
        assert planned.planned
        assert planned.p == planned.effect.p
    assert sum(comparison.planned for comparison in found.values()) == 2


def test_one_run_against_one_run_speaks_of_questions_only(tmp_path: Path) -> None:
    study = replace(STUDY, arms={"full": [], "fixed": []}, baseline="fixed", primary=None)
    record = collect(study, plan(tmp_path, study))
    assert all(comparison.effect.samples_only for comparison in compare(record).values())
    assert markdown(arms_table(record)).count("(questions only) ") == 2 * 2


def cells(record: StudyRecord) -> dict[tuple[str, str], dict[str, str]]:
    """The cells by model and arm, and column; a bold one in stars."""
    table = arms_table(record)
    lines = [
        [f"**{cell}**" if (i, j) in table.bold else cell for j, cell in enumerate(line)] for i, line in enumerate(table.lines)
    ]
    return {(line[0], line[1]): dict(zip(table.header, line, strict=True)) for line in lines}


def test_the_best_arm_is_bold_and_full_precision_takes_no_part(record: StudyRecord) -> None:
    for (_, arm), line in cells(record).items():
        for column in ("accuracy %", "loss"):
            assert line[column].startswith("**") == (arm == "better")
        assert line["KL"].startswith("**") == (arm != "full")  # all alike
        assert "**" not in line["bits, layers"]


def test_the_gap_is_that_between_baseline_and_full_precision(record: StudyRecord) -> None:
    table = {row.arm: row for row in rows(record) if row.point.short["model"] == "one"}
    low, high, mine = (table[arm].mean("loss") for arm in ("full", "base", "better"))
    assert table["better"].gap_closed == pytest.approx(100 * (1 - (mine - low) / (high - low)))
    assert table["base"].gap_closed is None
    assert table["full"].gap_closed is None
    assert cells(record)["one", "better"]["loss gap closed %"] == f"{table['better'].gap_closed:.0f}"


def test_the_csv_leads_to_runs_and_commands(record: StudyRecord) -> None:
    lines = list(csv.DictReader(io.StringIO(arms_table(record).csv)))
    line = next(x for x in lines if (x["model"], x["arm"]) == ("two", "better"))
    assert line["run ids"].split() == ["two-better-0", "two-better-1", "two-better-2"]
    assert shlex.split(line["commands"].split("; ")[1]) == ["mgvq-run", "model=two", "arm=better", "list=[1, 2]", "seed=1"]
    effect = compare(record)["accuracy", record.points[-1], "better"].effect
    assert float(line["accuracy % low"]) == pytest.approx(100 * effect.low, rel=1e-5)
    assert line["flags"] == "3"


def test_the_note_says_what_the_marks_are(record: StudyRecord) -> None:
    text = markdown(arms_table(record)).split("\n\n", 1)[1]
    for words in (
        "All rows: scope all.",
        "difference to base",
        "3 seeds x 30 pictures",
        "no p below 0.25",
        "(planned)",
        "Loss gap",
    ):
        assert words in text


def test_without_a_baseline_the_table_compares_nothing(tmp_path: Path) -> None:
    study = replace(STUDY, baseline=None, primary=None)
    record = collect(study, plan(tmp_path, study))
    table = arms_table(record)
    columns = "model arm accuracy_% loss KL bits,_layers bits,_model quantise_s evaluate_s runs flags"
    assert table.header == [column.replace("_", " ") for column in columns.split()]
    assert not table.bold
    assert "baseline" not in markdown(arms_table(record))


def test_latex_is_a_booktabs_table(record: StudyRecord) -> None:
    table = arms_table(record)
    text = latex(table)
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(body) == len(table.lines) + 1
    assert {line.count(" & ") for line in body} == {len(table.header) - 1}
    assert rf"\begin{{tabular}}{{{'l' * len(table.header)}}}" in text
    assert r"accuracy \%" in body[0]
    assert r"\textbf{" in text
    assert r"$\pm$" in text
    assert not any("**" in line or "+-" in line for line in body)


def test_the_time_left_comes_from_finished_runs(tmp_path: Path) -> None:
    assert predicted_seconds(plan(tmp_path, done=False), jobs=2) is None
    runs = plan(tmp_path)
    assert predicted_seconds(runs, jobs=2) == 0
    for path in ("one-better-0", "one-better-1"):
        (tmp_path / "runs" / path / "DONE").unlink()
    assert predicted_seconds(runs, jobs=1) == pytest.approx(2 * (20 + 30 + 10))
    assert predicted_seconds(runs, jobs=2) == pytest.approx(20 + 30 + 10)


def test_what_a_study_can_find_rests_on_its_own_record_if_there_is_one(record: StudyRecord, tmp_path: Path) -> None:
    runs = plan(tmp_path)
    assumed = detectable(STUDY, runs, tmp_path / "records")
    assert "spread assumed" in assumed
    assert "3 seeds x 30 pictures, Holm over 4 arms" in assumed
    write_record(record, tmp_path / "records" / "another.parquet")
    other = detectable(STUDY, runs, tmp_path / "records")
    assert "spread of another" in other
    assert other.split(" with ")[0] != assumed.split(" with ")[0]
    write_record(record, tmp_path / "records" / "made_up.parquet")
    assert "spread of made_up" in detectable(STUDY, runs, tmp_path / "records")
    assert "tests no difference" in detectable(replace(STUDY, baseline=None, primary=None), runs, tmp_path / "records")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"baseline": "bse", "primary": None}, "baseline must be one of the arms full, base"),
        ({"baseline": None}, "name one with baseline"),
        ({"primary": {"arm": "base", "metric": "loss"}}, "primary.arm must be one of full, better"),
        ({"primary": {"arm": "better", "metric": "kl"}}, "primary.metric must be one of accuracy, loss, perplexity; got 'kl'"),
        ({"primary": {"arm": "better"}}, "primary must be"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused(changes: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        replace(STUDY, **changes)


def test_seeds_may_differ_between_values_of_the_grid() -> None:
    settings = dict(name="s", question="?", arms={"a": ["x=1", "budget=3"], "b": []}, grid={"model": ["m", "n"], "budget": [2]})
    study = Study(**settings, seeds={"m": [0], "n": [0, 1, 2]})
    assert [study.seeds_at(point) for point in study.points()] == [[0], [0, 1, 2]]
    assert study.least_seeds == 1
    point = {"model": "n", "budget": 2}
    assert study.overrides("b", point) == ["model=n", "budget=2"]
    assert study.overrides("a", point) == ["model=n", "x=1", "budget=3"], "the arm's own word wins over the grid's"
    with pytest.raises(UserError, match="no key of the grid"):
        Study(**settings, seeds={"m": [0]})


@pytest.mark.parametrize("word", ["a.b=1", "+a.b=x=y", "++a.b={c: 1}", "~a.b", "~a.b=1", " a.b=1"])
def test_a_word_sets_one_key_however_it_is_written(word: str) -> None:
    assert key_of(word) == "a.b"


def test_a_stress_variant_and_a_moving_revision_stand_in_the_tables(tmp_path: Path) -> None:
    """Beside the model's name, once for all arms of a grid point, and not among the fallbacks that are counted."""
    runs = plan(tmp_path)
    for run in {run.folder.path: run for run in runs}.values():
        model, flags = run.point["model"], {"one": ["model:stress 0.7"], "two": []}
        (run.folder.path / "identity.json").write_text(json.dumps({"model": {"name": model}}))
        metrics = run.folder.metrics()
        metrics["flags"] += flags[model]
        (run.folder.path / "metrics.json").write_text(json.dumps(metrics))
        declare_done(run.folder.path)
    record = collect(STUDY, runs)
    assert list(dict.fromkeys(row.point.short["model"] for row in rows(record))) == ["one (stress 0.7)", "two"]
    assert {(row.arm == "better", row.flags) for row in rows(record)} == {(True, 3), (False, 0)}
    for table in (markdown(arms_table(record)), latex(arms_table(record)), arms_table(record).csv):
        assert "one (stress 0.7)" in table
