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
from omegaconf import OmegaConf

from mgvq.analysis.records.records import collect, questions, read_records, write_records
from mgvq.analysis.report import write_tables
from mgvq.analysis.statistics.compare import compare
from mgvq.analysis.statistics.forecast import detectable, predicted_seconds
from mgvq.analysis.statistics.significance import holm
from mgvq.analysis.tables.render import latex, markdown, plain, printable
from mgvq.analysis.tables.table import rows
from mgvq.errors import UserError
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
        "bits/quantized_layers": 2.0,
        "bits/model": 3.0,
        "time/quantize_s": 20.0,
        "time/evaluate_s": 30.0,
        "rate": "full_precision" if arm == "full" else "2x16",
        "flags": ["empty_cluster"] if arm == "better" else [],
    }
    folder.mkdir(parents=True)
    samples.to_parquet(folder / "samples.parquet")
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "identity.json").write_text("{}")
    (folder / "DONE").touch()


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
def records(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    return collect(STUDY, plan(tmp_path_factory.mktemp("results")))


def test_a_record_keeps_what_the_tables_need(records: pd.DataFrame, tmp_path: Path) -> None:
    write_records(records, tmp_path / "records" / "made_up.parquet")
    back = read_records(tmp_path / "records" / "made_up.parquet")
    assert back.attrs == records.attrs
    assert list(questions(back).type) == list(TYPES) * NUM_PICTURES
    assert list(questions(back).picture) == [i // 4 for i in range(4 * NUM_PICTURES)]
    assert len(back) == 2 * (3 + 3 + 3 + 1 + 1)
    assert {tuple(seeds) for seeds in back[back.arm == "full"].seeds} == {(0, 1, 2)}
    assert markdown(back) == markdown(records)
    written = write_tables("made_up", back, tmp_path)
    assert {path.name for path in written} == {"made_up.md", "made_up.csv", "made_up.tex", "made_up_verdict.md"}
    assert (tmp_path / "tables" / "made_up.md").read_text() == markdown(records)


def test_runs_that_answered_different_questions_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "two-base-2"
    finish(folder, "base", 2, "two", picture_seed=1)
    with pytest.raises(UserError, match="different test questions"):
        collect(STUDY, plan(tmp_path))


def test_differences_are_those_of_the_metrics(records: pd.DataFrame) -> None:
    """Headline and loss a token are no plain means over questions; the differences are theirs, to the rounding of the losses."""
    table = {(row.point["model"], row.arm): row for row in rows(records)}
    for (model, arm), row in table.items():
        assert bool(row.comparisons) == (arm != "base")
        for name, found in row.comparisons.items():
            factor = 100 if name == "accuracy %" else 1
            assert factor * found.effect.mean == pytest.approx(row.mean(name) - table[model, "base"].mean(name), abs=5e-4)
            assert found.effect.num_seeds == 3  # those of the baseline, where the arm has one run


def test_holm_runs_over_the_arms_of_a_point_and_leaves_the_planned_comparison_alone(records: pd.DataFrame) -> None:
    found = compare(records)
    for point in records.point.unique():
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
    records = collect(study, plan(tmp_path, study))
    assert all(comparison.effect.samples_only for comparison in compare(records).values())
    assert markdown(records).count("(questions only) ") == 2 * 2


def cells(records: pd.DataFrame) -> dict[tuple[str, str], dict[str, str]]:
    header, *lines = printable(records)
    return {(line[0], line[1]): dict(zip(header, line, strict=True)) for line in lines}


def test_the_best_arm_is_bold_and_full_precision_takes_no_part(records: pd.DataFrame) -> None:
    for (_, arm), line in cells(records).items():
        for column in ("accuracy %", "loss"):
            assert line[column].startswith("**") == (arm == "better")
        assert line["KL"].startswith("**") == (arm != "full")  # all alike
        assert "**" not in line["bits, layers"]


def test_the_gap_is_that_between_baseline_and_full_precision(records: pd.DataFrame) -> None:
    table = {row.arm: row for row in rows(records) if row.point["model"] == "one"}
    low, high, mine = (table[arm].mean("loss") for arm in ("full", "base", "better"))
    assert table["better"].gap_closed == pytest.approx(100 * (1 - (mine - low) / (high - low)))
    assert table["base"].gap_closed is None
    assert table["full"].gap_closed is None
    assert cells(records)["one", "better"]["loss gap closed %"] == f"{table['better'].gap_closed:.0f}"


def test_the_csv_leads_to_runs_and_commands(records: pd.DataFrame) -> None:
    lines = list(csv.DictReader(io.StringIO(plain(records))))
    line = next(x for x in lines if (x["model"], x["arm"]) == ("two", "better"))
    assert line["run ids"].split() == ["two-better-0", "two-better-1", "two-better-2"]
    assert shlex.split(line["commands"].split("; ")[1]) == ["mgvq-run", "model=two", "arm=better", "list=[1, 2]", "seed=1"]
    effect = compare(records)["accuracy", records.point.iloc[-1], "better"].effect
    assert float(line["accuracy % low"]) == pytest.approx(100 * effect.low, rel=1e-5)
    assert line["flags"] == "3"


def test_the_note_says_what_the_marks_are(records: pd.DataFrame) -> None:
    text = markdown(records).split("\n\n", 1)[1]
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
    records = collect(study, plan(tmp_path, study))
    header, *lines = printable(records)
    columns = "model arm accuracy_% loss KL bits,_layers bits,_model quantise_s evaluate_s runs flags"
    assert header == [column.replace("_", " ") for column in columns.split()]
    assert not any("**" in cell for line in lines for cell in line)
    assert "baseline" not in markdown(records)


def test_latex_is_a_booktabs_table(records: pd.DataFrame) -> None:
    header, *lines = printable(records)
    text = latex(records)
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(body) == len(lines) + 1
    assert {line.count(" & ") for line in body} == {len(header) - 1}
    assert rf"\begin{{tabular}}{{{'l' * len(header)}}}" in text
    assert r"accuracy \%" in body[0]
    assert r"\textbf{" in text
    assert r"$\pm$" in text
    assert not any("**" in line or "+-" in line for line in body)


def test_a_metric_that_was_not_finite_is_shown_as_such(tmp_path: Path) -> None:
    runs = plan(tmp_path)
    file = runs[-1].folder.path / "metrics.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "kl/full_precision": None}))
    assert cells(collect(STUDY, runs))["two", "fixed"]["KL"] == "nan"


def test_the_time_left_comes_from_finished_runs(tmp_path: Path) -> None:
    assert predicted_seconds(plan(tmp_path, done=False), jobs=2) is None
    runs = plan(tmp_path)
    assert predicted_seconds(runs, jobs=2) == 0
    for path in ("one-better-0", "one-better-1"):
        (tmp_path / "runs" / path / "DONE").unlink()
    assert predicted_seconds(runs, jobs=1) == pytest.approx(2 * (20 + 30 + 10))
    assert predicted_seconds(runs, jobs=2) == pytest.approx(20 + 30 + 10)


def test_what_a_study_can_find_rests_on_its_own_record_if_there_is_one(records: pd.DataFrame, tmp_path: Path) -> None:
    runs = plan(tmp_path)
    assumed = detectable(STUDY, runs, tmp_path / "records")
    assert "spread assumed" in assumed
    assert "3 seeds x 30 pictures, Holm over 4 arms" in assumed
    write_records(records, tmp_path / "records" / "another.parquet")
    other = detectable(STUDY, runs, tmp_path / "records")
    assert "spread of another" in other
    assert other.split(" with ")[0] != assumed.split(" with ")[0]
    write_records(records, tmp_path / "records" / "made_up.parquet")
    assert "spread of made_up" in detectable(STUDY, runs, tmp_path / "records")
    assert "no baseline" in detectable(replace(STUDY, baseline=None, primary=None), runs, tmp_path / "records")


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
    with pytest.raises(UserError, match="seeds of n"):
        Study(**settings, seeds={"m": [0], "n": 5})


def test_a_stress_variant_and_a_moving_revision_stand_in_the_tables(tmp_path: Path) -> None:
    """Beside the model's name, once for all arms of a grid point, and not among the fallbacks that are counted."""
    runs = plan(tmp_path)
    for run in {run.folder.path: run for run in runs}.values():
        model, flags = run.point["model"], {"one": ["model:stress 0.7"], "two": []}
        (run.folder.path / "identity.json").write_text(json.dumps({"model": {"name": model}}))
        metrics = run.folder.metrics()
        metrics["flags"] += flags[model]
        (run.folder.path / "metrics.json").write_text(json.dumps(metrics))
    records = collect(STUDY, runs)
    assert list(dict.fromkeys(row.point["model"] for row in rows(records))) == ["one (stress 0.7)", "two"]
    assert {(row.arm == "better", row.flags) for row in rows(records)} == {(True, 3), (False, 0)}
    for table in (markdown(records), latex(records), plain(records)):
        assert "one (stress 0.7)" in table
