"""`mgvq-study` and `mgvq-report`: what is missing is run, failures are shown, tables come out."""

import shutil
from pathlib import Path

import pytest
from conftest import run_command

from mgvq.errors import UserError
from mgvq.studies.spec import read_study

QUICK = """
name: quick
question: does it run?
common: [scope=language_projector, evaluation.num_questions=8, evaluation.answers=forced, codebook.sample=64]
grid: {model: [tiny_internvl]}
arms: {two bits: [method=kmeans], three bits: [method=kmeans, budget.bits_per_weight=3]}
seeds: [0, 1]
"""
COMPARED = (
    QUICK
    + """
baseline: two bits
primary: {arm: three bits, metric: loss}
"""
)


def test_a_study_runs_what_is_missing_and_tabulates(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(COMPARED)
    results = tmp_path / "results"
    planned = run_command("mgvq.cli.study", str(study), "--dry", results=results)
    assert "4 runs, 0 done, 4 to run (time: unknown" in planned.stdout
    assert "2 seeds x 2 pictures, Holm over 1 arm; spread assumed" in planned.stdout
    unfinished = run_command("mgvq.cli.report", str(study), results=results, check=False)
    assert unfinished.returncode == 2
    assert "4 of 4 runs are missing" in unfinished.stderr
    assert "two bits (tiny_internvl), seed 0: not run" in unfinished.stderr
    first = run_command("mgvq.cli.study", str(study), "--jobs", "2", results=results)
    assert [line.split()[:2] for line in first.stderr.splitlines() if "done after" in line] == [
        [f"{i}/4", "done"] for i in range(1, 5)
    ]
    again = run_command("mgvq.cli.study", str(study), results=results)
    assert "4 runs, 4 done, 0 to run (time: about 0.0 min" in again.stdout
    assert first.stdout.split("\n\n", 1)[1] == again.stdout.split("\n\n", 1)[1]
    rows = [line for line in again.stdout.splitlines() if line.startswith("| t")]
    assert len(rows) == 2
    assert all("+-" in row for row in rows)
    assert "All rows: model tiny_internvl." in again.stdout
    assert again.stdout.count(" (planned) ") == 1
    run_command("mgvq.cli.report", str(study), results=results)
    written = {file.name: file.read_bytes() for file in (results / "tables").iterdir()}
    assert set(written) == {f"{name}.{kind}" for name in ("quick", "quick_limits") for kind in ("md", "csv", "tex")} | {
        "quick_verdict.md"
    }
    run_command("mgvq.cli.report", str(study), "--from-records", results=results)
    assert {file.name: file.read_bytes() for file in (results / "tables").iterdir()} == written
    assert "spread of quick" in run_command("mgvq.cli.study", str(study), "--dry", results=results).stdout
    study.write_text(f'{COMPARED}frozen: "0123abc"\n')
    (results / "runs").rename(tmp_path / "gone")
    run_command("mgvq.cli.report", str(study), results=results)
    assert {file.name: file.read_bytes() for file in (results / "tables").iterdir()} == written, "from the record alone"


def test_studies_that_belong_together_are_run_and_reported_together(tmp_path: Path) -> None:
    study, results = tmp_path / "study.yaml", tmp_path / "results"
    (tmp_path / "more.yaml").write_text(QUICK.replace("name: quick", "name: more").replace("[0, 1]", "[2]"))
    study.write_text(QUICK.replace("[0, 1]", "[0]") + "also: [more.yaml]\n")
    run = run_command("mgvq.cli.study", str(study), results=results)
    assert run.stdout.count("2 runs, 0 done, 2 to run") == 2
    assert run.stdout.count("| two bits") == 2, "each has its table"
    run_command("mgvq.cli.report", str(study), results=results)
    assert {file.stem for file in (results / "records").glob("*.parquet")} == {"quick", "more"}
    for folder in (results / "runs").iterdir():
        if folder.name != ".logs":
            shutil.rmtree(folder)
    known = run_command("mgvq.cli.study", str(study), "--recorded", results=results)
    assert known.stdout.count("2 runs, 0 done, 2 in records, 0 to run") == 2
    assert known.stdout.count("| two bits") == 2
    records = {file.name: file.read_bytes() for file in (results / "records").rglob("*.parquet")}
    run_command("mgvq.cli.report", str(study), "--recorded", results=results)
    assert {file.name: file.read_bytes() for file in (results / "records").rglob("*.parquet")} == records
    alone = run_command("mgvq.cli.study", str(study), "--dry", "evaluation.num_questions=4", results=results)
    assert "more" not in alone.stdout, "a quick pass is of the study alone"


def test_a_frozen_study_is_not_run(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(f'{QUICK.replace("method=kmeans", "method=gone")}frozen: "0123abc"\n')
    results = tmp_path / "results"
    refused = run_command("mgvq.cli.study", str(study), results=results, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("mgvq-study: study quick is frozen at 0123abc: it is reported from its record")
    assert len(refused.stderr.splitlines()) == 1
    dry = run_command("mgvq.cli.study", str(study), "--dry", results=results)
    assert f"frozen at 0123abc: nothing is run, mgvq-report reads {results}/records/quick.parquet" in dry.stdout
    overridden = run_command("mgvq.cli.study", str(study), "--dry", "seed=0", results=results, check=False)
    assert (overridden.returncode, overridden.stdout) == (2, "")
    assert "study quick is frozen at 0123abc: not run, so seed=0 has no effect" in overridden.stderr
    report = run_command("mgvq.cli.report", str(study), results=results, check=False)
    assert report.returncode == 2
    assert "records/quick.parquet is missing" in report.stderr
    assert not results.exists()


def test_a_failing_run_does_not_stop_the_others(tmp_path: Path) -> None:
    """A budget between two rates shows only when the layers are known: at run time. The others get their table."""
    study = tmp_path / "study.yaml"
    study.write_text(
        QUICK.replace(
            "three bits: [method=kmeans, budget.bits_per_weight=3]",
            "tiny: [budget.bits_per_weight=1.4]",
        )
    )
    done = run_command("mgvq.cli.study", str(study), "--jobs", "2", results=tmp_path / "results", check=False)
    assert done.returncode == 1
    assert "falls between two rates" in done.stderr
    assert "2 runs failed" in done.stderr
    assert "arm tiny, seed 1" in done.stderr
    assert "**PARTIAL: 2 of 4 runs are missing" in done.stdout
    assert "tiny (tiny_internvl), seed 0: failed: " in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.startswith("| t")]) == 2
    partial = run_command("mgvq.cli.report", str(study), "--partial", results=tmp_path / "results")
    assert "quick_partial.md" in partial.stdout
    assert not (tmp_path / "results" / "records").exists()
    refused = run_command("mgvq.cli.report", str(study), results=tmp_path / "results", check=False)
    assert refused.returncode == 2
    assert "tiny (tiny_internvl), seed 1: failed: " in refused.stderr
    assert len(list(tmp_path.glob("results/runs/*/DONE"))) == 2


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (QUICK.replace("method=kmeans]", "method=kmean]"), "kmean"),
        (QUICK.replace("seeds: [0, 1]", "seeds: []"), "seeds is empty"),
        (QUICK.replace("seeds", "seed"), "seed"),
        (QUICK.replace("budget.bits_per_weight=3", "budget.bits_per_weight=9"), "arm three bits"),
        (QUICK.replace("budget.bits_per_weight=3", "codebook.share=foo"), "codebook.share must be"),
        (QUICK.replace("budget.bits_per_weight=3", "sensitivity=weight_norm"), "sensitivity has no effect"),
        (COMPARED.replace("baseline: two bits", "baseline: one bit"), "baseline must be one of the arms"),
        (COMPARED.replace("{arm: three bits, metric: loss}", "three bits"), "primary must be {arm: ..."),
        (f"{QUICK}frozen: yes", "frozen must be 7 to 40 hex digits of a commit, in quotes, got True"),
    ],
)
def test_a_bad_study_is_refused_before_its_first_run(content: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(content)
    done = run_command("mgvq.cli.study", str(tmp_path / "study.yaml"), results=tmp_path / "results", check=False)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "results").exists()


def test_a_missing_study_is_named() -> None:
    with pytest.raises(UserError, match="no/such/study"):
        read_study(Path("no/such/study.yaml"))
