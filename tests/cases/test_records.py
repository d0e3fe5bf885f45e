"""What goes into tables: runs whose files are their own, values that are there, records that are records; all else is named."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up_study import STUDY, copied, plan, rewrite_metrics, rewrite_samples, with_names

from mgvq.analysis.html import write_html
from mgvq.analysis.records.collect import collect
from mgvq.analysis.records.layers import COLUMNS, collect_layers, layers_path, read_layers, write_layers
from mgvq.analysis.records.recorded import Recorded
from mgvq.analysis.records.records import StudyRecord, read_record, write_record
from mgvq.analysis.report import write_figures, write_tables
from mgvq.analysis.statistics.compare import PROCEDURE, compare
from mgvq.analysis.statistics.forecast import detectable, predicted_seconds
from mgvq.analysis.tables.arms import DIFFERENCE, arms_table
from mgvq.analysis.tables.render import MISSING, markdown
from mgvq.analysis.tables.spread_table import spread_table
from mgvq.analysis.tables.trainings_table import trainings_table
from mgvq.analysis.verdict import verdict
from mgvq.errors import UserError
from mgvq.runs.store import RunFolder

RUN = "one-2-1"  # arm better of model one, seed 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results with the runs of the whole study."""
    results = tmp_path_factory.mktemp("whole")
    plan(results)
    return results


@pytest.fixture
def results(whole: Path, tmp_path: Path) -> Path:
    """A copy of them to damage."""
    return copied(whole, tmp_path)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit(file: Path) -> None:
    file.write_text(file.read_text().replace("0", "9", 1) + " ")


def of_another_run(file: Path) -> None:
    shutil.copyfile(file.parents[1] / "one-1-1" / file.name, file)


def write_garbage(file: Path) -> None:
    file.write_bytes(b"\xff\xfe garbage")


# What is done to which file of a finished run. A new damage is a line.
DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    ("metrics.json", edit),
    ("metrics.json", empty),
    ("metrics.json", truncate),
    ("metrics.json", of_another_run),
    ("metrics.json", Path.unlink),
    ("samples.parquet", of_another_run),
    ("samples.parquet", flip),
    ("samples.parquet", truncate),
    ("samples.parquet", empty),
    ("samples.parquet", Path.unlink),
    ("identity.json", empty),
    ("identity.json", edit),
    ("identity.json", Path.unlink),
    ("config.yaml", empty),
    ("config.yaml", edit),
    ("config.yaml", Path.unlink),
    ("DONE", empty),
    ("DONE", truncate),
    ("DONE", write_garbage),
    ("DONE", lambda file: file.write_text("{}")),
    ("DONE", lambda file: file.write_text("[1]")),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES, ids=[f"{name}-{number}" for number, (name, _) in enumerate(DAMAGES)])
def test_a_run_whose_files_have_changed_is_in_no_table(name: str, damage: Callable[[Path], object], results: Path) -> None:
    damage(results / "runs" / RUN / name)
    runs = plan(results)
    with pytest.raises(UserError) as caught:
        collect(STUDY, runs)
    told = str(caught.value)
    assert "1 of 18 runs are missing" in told
    assert "better (one), seed 1: " in told
    assert f"{RUN}/{name}" in told
    partial = collect(STUDY, runs, partial=True)
    assert [(cell.arm, missing.seeds) for cell, missing in partial.missing] == [("better", (1,))]
    assert RUN not in {run.run for run in partial.runs}


def test_runs_without_a_folder_are_taken_from_any_record(results: Path) -> None:
    runs = plan(results)
    whole = collect(STUDY, runs)
    write_record(replace(whole, cells=tuple(c for c in whole.cells if c.arm != "better")), results / "records" / "other.parquet")
    layers = pd.DataFrame({"point": whole.points[0].text, "arm": ["base", "better"], "value": [1.0, 2.0]})
    write_layers(layers.reindex(columns=COLUMNS), layers_path(results, "other"))
    for run in runs:
        if run.arm != "better":
            shutil.rmtree(run.folder.path, ignore_errors=True)
    runs = plan_without_writing(results)
    with pytest.raises(UserError, match=f"{sum(r.arm != 'better' for r in runs)} of 18 runs are missing"):
        collect(STUDY, runs)
    recorded = Recorded(results, STUDY.name)
    again = collect(STUDY, runs, recorded=recorded)
    assert markdown(arms_table(again)) == markdown(arms_table(whole))
    assert recorded.layers(runs)[["arm", "value"]].to_numpy().tolist() == [["base", 1.0]], "an arm with folders is read from them"


def test_a_run_that_no_record_has_is_missing(results: Path) -> None:
    runs = plan(results)
    write_record(collect(STUDY, runs), results / "records" / "made_up.parquet")
    rewrite_metrics(results / "runs" / RUN, {"kl/full_precision": 7.0})
    write_record(collect(STUDY, runs), results / "records" / "a.parquet")
    assert [Recorded(results, study).run(RUN).metrics["kl/full_precision"] == 7.0 for study in ("made_up", "b")] == [False, True]
    edit(results / "runs" / RUN / "metrics.json")
    assert RUN in {run.run for run in collect(STUDY, runs, recorded=Recorded(results, STUDY.name)).runs}, (
        "a damaged folder is none"
    )
    other = tuple(replace(run, folder=RunFolder(results / "runs" / f"{run.folder.path.name}0")) for run in runs)
    with pytest.raises(UserError, match="18 of 18 runs are missing"):
        collect(STUDY, other, recorded=Recorded(results, STUDY.name))


# What else a run may be, and what is said of it.
UNFINISHED: dict[str, tuple[Callable[[Path], object], str]] = {
    "not run": (shutil.rmtree, "better (one), seed 1: not run"),
    "killed": (lambda run: (run / "DONE").unlink(), "has no DONE"),
    "failed": (
        lambda run: (
            (run / "DONE").unlink(),
            (run / "FAILED").write_text("Traceback ...\nmgvq.errors.UserError: too few bits\n"),
        ),
        "better (one), seed 1: failed: too few bits",
    ),
}


@pytest.mark.parametrize("case", UNFINISHED.values(), ids=list(UNFINISHED))
def test_a_partial_table_says_what_is_missing(case: tuple[Callable[[Path], object], str], results: Path) -> None:
    spoil, said = case
    spoil(results / "runs" / RUN)
    runs = plan_without_writing(results)
    with pytest.raises(UserError, match="--partial"):
        collect(STUDY, runs)
    record = collect(STUDY, runs, partial=True)
    text = markdown(arms_table(record))
    assert text.startswith("**PARTIAL: 1 of 18 runs are missing, and no number here is final. ")
    assert said in text.splitlines()[0]
    assert cell(record, "better", "runs") == "2 (1 missing)"
    assert "PARTIAL" in verdict(record)[0]
    effect = compare(record)["loss", record.points[0], "better"].effect
    assert effect.num_seeds == 2, "paired at the seeds that both arms have"
    with pytest.raises(UserError, match="needs all its runs"):
        write_record(record, results / "records" / "made_up.parquet")
    written = write_tables("made_up_partial", record, results)
    assert all("PARTIAL" in file.read_text() for file in written if file.suffix in (".md", ".tex"))
    assert "seeds missing" in (results / "tables" / "made_up_partial.csv").read_text()
    write_figures("made_up_partial", record, collect_layers(runs, record), results)
    page = write_html("made_up_partial", STUDY, record, results / "page").read_text()
    assert page.count("PARTIAL: 1 of 18 runs are missing") == 1


def plan_without_writing(results: Path) -> list:
    """The planned runs; what is not there stays so."""
    there = {path.name for path in (results / "runs").iterdir()}
    runs = plan(results)
    for path in (results / "runs").iterdir():
        if path.name not in there:
            shutil.rmtree(path)
    return runs


@pytest.mark.parametrize("arm", ["full", "base", "better"])
def test_a_table_without_a_whole_arm_is_made(arm: str, results: Path) -> None:
    """The baseline too: then nothing is compared with it."""
    number = list(STUDY.arms).index(arm)
    for run in (results / "runs").glob(f"one-{number}-*"):
        shutil.rmtree(run)
    record = collect(STUDY, plan_without_writing(results), partial=True)
    assert [c.arm for c in record.at(record.points[0]).values()] == list(STUDY.arms)
    assert cell(record, arm, "loss") == MISSING
    assert cell(record, arm, "runs") == "0 (3 missing)"
    assert (cell(record, "better", DIFFERENCE) == MISSING) == (arm in ("base", "better"))
    write_tables("made_up_partial", record, results)
    write_figures("made_up_partial", record, pd.DataFrame(columns=read_layers(results / "none").columns), results)
    write_html("made_up_partial", STUDY, record, results / "page")


def test_a_study_without_any_run_has_no_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished run to tabulate"):
        collect(STUDY, plan_without_writing_any(tmp_path), partial=True)


def plan_without_writing_any(results: Path) -> list:
    runs = plan(results)
    shutil.rmtree(results / "runs")
    return runs


def cell(record: StudyRecord, arm: str, column: str, model: str = "one") -> str:
    """A cell of the main table; a heading that stands several times is that of the last column of its name."""
    table = arms_table(record)
    line = next(line for line in table.lines if line[:2] == [model, arm])
    return dict(zip(table.header, line, strict=True))[column]


# A value of one run that is none: how it comes about, and the column that has to be missing.
NOT_FINITE: dict[str, tuple[Callable[[Path], None], str]] = {
    "metric loss": (lambda run: rewrite_metrics(run, {"loss/answer": None}), "loss"),
    "metric accuracy": (lambda run: rewrite_metrics(run, {"tiny_vqa/accuracy": None}), "accuracy %"),
    "metric KL": (lambda run: rewrite_metrics(run, {"kl/full_precision": None}), "KL"),
    "metric bits": (lambda run: rewrite_metrics(run, {"bits/quantized_layers": None}), "bits, layers"),
    "metric NaN": (lambda run: rewrite_metrics(run, {"loss/answer": float("nan")}), "loss"),
    "metric infinite": (lambda run: rewrite_metrics(run, {"loss/answer": float("inf")}), "loss"),
    "sample loss NaN": (lambda run: rewrite_samples(run, "loss", np.nan), "loss"),
    "sample loss infinite": (lambda run: rewrite_samples(run, "loss", np.inf), "loss"),
    "sample KL NaN": (lambda run: rewrite_samples(run, "kl", np.nan), "KL"),
    "sample score NaN": (lambda run: rewrite_samples(run, "score", np.nan), "accuracy %"),
}


@pytest.mark.parametrize("case", NOT_FINITE.values(), ids=list(NOT_FINITE))
def test_a_value_that_is_not_finite_makes_its_cell_missing_and_nobody_better(
    case: tuple[Callable[[Path], None], str], whole: Path, results: Path
) -> None:
    spoil, column = case
    before = collect(STUDY, plan(whole))
    spoil(results / "runs" / RUN)
    write_record(collect(STUDY, plan(results)), results / "records" / "made_up.parquet")
    record = read_record(results / "records" / "made_up.parquet")
    table = arms_table(record)
    assert cell(record, "better", column) == MISSING
    assert f"{column} of better (one) at seed 1" in table.note
    lost = next(i for i, line in enumerate(table.lines) if line[:2] == ["one", "better"])
    assert (lost, list(table.header).index(column)) not in table.bold
    assert "nan" not in markdown(table)
    assert "nan" not in table.csv
    for other in ("full", "base"):
        assert cell(record, other, column) == cell(before, other, column), "the others are what they were"
    for key, found in compare(record).items():
        assert found.p >= compare(before)[key].p, "no p value gets better by it"
    write_tables("made_up", record, results)
    write_figures("made_up", record, read_layers(results / "none"), results)
    assert "nan" not in write_html("made_up", STUDY, record, results / "page").read_text().split("<main>")[1].split("<script>")[0]
    assert not any("nan" in sentence for sentence in verdict(record))


def test_the_correction_counts_an_arm_that_has_no_value(results: Path) -> None:
    study = replace(STUDY, primary=None)
    rewrite_samples(results / "runs" / RUN, "loss", np.nan)
    record = collect(study, plan(results))
    found = compare(record)
    assert ("loss", record.points[0], "better") not in found
    assert found["loss", record.points[0], "full"].p == pytest.approx(2 * found["loss", record.points[0], "full"].effect.p)


def test_tables_of_seeds_and_of_trainings_lack_what_is_not_finite(results: Path) -> None:
    study = with_names("full", "base", "better")
    rewrite_samples(results / "runs" / RUN, "loss", np.nan)
    record = collect(study, plan(results, study))
    of_seeds = replace(record, spread="base", cells=tuple(c for c in record.cells if c.arm != "full"))
    table = spread_table(of_seeds)
    line = next(line for line in table.lines if line[:2] == [record.points[0].text, "better"])
    assert line[list(table.header).index("loss: sd of runs")] == MISSING
    assert line[list(table.header).index("accuracy %: sd of runs")] != MISSING
    assert "loss of better (one) at seed 1" in table.note
    of_trainings = trainings_table(replace(record, trainings="model"))
    assert ["loss", "better"] not in [list(line[:2]) for line in of_trainings.lines]
    assert ["loss", "base"] in [list(line[:2]) for line in of_trainings.lines]
    assert "loss of better (one) at seed 1" in of_trainings.note
    assert any("cannot be said" in sentence for sentence in verdict(replace(record, trainings="model")))


def test_a_forecast_rests_on_finite_values(results: Path) -> None:
    rewrite_samples(results / "runs" / RUN, "loss", np.nan)
    write_record(collect(STUDY, plan(results)), results / "records" / "made_up.parquet")
    runs = plan(results)
    assert "nan" not in detectable(STUDY, runs, results / "records")


# What is done to a record file, and what the refusal says.
BAD_RECORDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "is missing"),
    "empty": (empty, "cannot be read as parquet"),
    "cut short": (truncate, "cannot be read as parquet"),
    "text": (lambda file: file.write_text("run,arm\n"), "cannot be read as parquet"),
    "another table": (lambda file: pd.DataFrame({"a": [1]}).to_parquet(file), "is no record of a study: it has no run, arm"),
    "without metadata": (lambda file: without_attrs(file), "it has no questions"),
    "without runs": (lambda file: pd_with(file, lambda frame: frame.iloc[:0]), "it has no runs"),
    "bad metrics": (lambda file: pd_with(file, lambda frame: frame.assign(metrics="{")), "is no record of a study"),
    "other metrics": (lambda file: pd_with(file, lambda frame: frame.assign(metrics="{}")), "has not measured tiny_vqa/accuracy"),
}  # fmt: skip


def pd_with(file: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    frame = pd.read_parquet(file)
    changed = change(frame)
    changed.attrs = frame.attrs
    changed.to_parquet(file)


def without_attrs(file: Path) -> None:
    frame = pd.read_parquet(file)
    frame.attrs = {}
    frame.to_parquet(file)


@pytest.mark.parametrize("case", BAD_RECORDS.values(), ids=list(BAD_RECORDS))
def test_a_bad_record_is_named(case: tuple[Callable[[Path], object], str], whole: Path, tmp_path: Path) -> None:
    damage, said = case
    file = tmp_path / "records" / "other.parquet"
    write_record(collect(STUDY, plan(whole)), file)
    damage(file)
    with pytest.raises(UserError, match=said) as caught:
        read_record(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_record_of_another_study_stops_no_study(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "other.parquet").write_bytes(b"PAR1")
    assert "spread assumed" in detectable(STUDY, plan(whole), tmp_path)
    assert "other.parquet cannot be read as parquet" in caplog.text


@pytest.mark.parametrize("damage", [empty, truncate, write_garbage, lambda file: pd.DataFrame({"a": [1]}).to_parquet(file)])
def test_a_bad_table_of_layers_is_named(damage: Callable[[Path], object], tmp_path: Path) -> None:
    file = tmp_path / "layers.parquet"
    read_layers(file).to_parquet(file)
    damage(file)
    with pytest.raises(UserError, match=r"layers\.parquet"):
        read_layers(file)


@pytest.mark.parametrize("damage", [empty, truncate, write_garbage, Path.unlink, lambda file: file.write_text("[]")])
def test_the_time_left_is_told_whatever_a_run_holds(damage: Callable[[Path], object], results: Path) -> None:
    damage(results / "runs" / RUN / "metrics.json")
    assert predicted_seconds(plan(results), jobs=1) == 0


def test_another_procedure_is_two_functions(whole: Path) -> None:
    """What a new statistic has to be: a test of the differences, and a correction of the p values of a grid point."""

    def bonferroni(p: np.ndarray) -> np.ndarray:
        return np.minimum(p * (~np.isnan(p)).sum(), 1)

    record = replace(collect(STUDY, plan(whole)), primary=None)
    for found in compare(record, replace(PROCEDURE, correct=bonferroni, correction_name="Bonferroni")).values():
        assert found.p == pytest.approx(min(2 * found.effect.p, 1))


@pytest.mark.parametrize("damage", [empty, truncate, write_garbage, Path.unlink, lambda file: file.write_text("{}")])
def test_the_metrics_of_a_run_are_those_that_it_wrote(damage: Callable[[Path], object], results: Path) -> None:
    """Whoever reads them: `mgvq-run` prints those of a run that was done before."""
    run = plan(results)[0].folder
    damage(run.path / "metrics.json")
    with pytest.raises(UserError, match=r"metrics\.json is (not the file that the run wrote|missing)"):
        run.metrics()


def test_a_run_of_another_version_is_in_no_table(results: Path) -> None:
    rewrite_metrics(results / "runs" / RUN, {"schema_version": 2})
    with pytest.raises(UserError, match=r"metrics\.json has schema_version 2, and this version of mgvq reads 1"):
        collect(STUDY, plan(results))
    with pytest.raises(UserError, match="Report it with the version in its provenance"):
        RunFolder(results / "runs" / RUN).metrics()
