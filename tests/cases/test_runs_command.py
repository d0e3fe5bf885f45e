"""`mgvq-runs list | show | diff | pack | check`, on made-up runs; what was sent and altered is told by name."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, declare_done, run_command
from made_up_study import plan

from mgvq.analysis.runs.differences import metrics_that_differ, settings_that_differ
from mgvq.analysis.runs.listed import chosen, find_run, read_runs
from mgvq.analysis.runs.methods import method_of
from mgvq.analysis.runs.sending import check_sent, pack
from mgvq.errors import UserError
from mgvq.runs.compose import composer
from mgvq.runs.identity import id_of, scientific_settings
from mgvq.runs.places import conf_folder

PROVENANCE = {"version": "1", "python": "3", "commit": "c", "dirty": None, "machine": {"platform": "p"}, "model": {"path": "x"}}


def settings(*overrides: str) -> dict:
    with composer() as compose:
        return scientific_settings(compose(*overrides))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of k-means, one of them with another sample, under the names that their settings have."""
    place = tmp_path_factory.mktemp("results")
    made = [run.folder.path for run in plan(tmp_path_factory.mktemp("made"))][3:5]
    for folder, words in zip(made, (("seed=1",), ("codebook.sample=64", "seed=2")), strict=True):
        own = settings("method=kmeans", *words)
        (folder / "identity.json").write_text(json.dumps(own))
        (folder / "provenance.json").write_text(json.dumps(PROVENANCE))
        declare_done(folder)
        shutil.copytree(folder, place / "runs" / id_of(own))
    return place


@pytest.mark.parametrize("preset", sorted(file.stem for file in (conf_folder() / "method").glob("*.yaml")))
def test_every_preset_is_recognised(preset: str) -> None:
    assert method_of(settings(f"method={preset}", "seed=3")) == preset


def test_runs_are_chosen_by_what_they_are(results: Path) -> None:
    runs, faults, unfinished = read_runs(results / "runs")
    assert (len(runs), faults, unfinished) == (2, [], 0)
    by_seed = {run.seed: run for run in chosen(runs, (), "seed")}
    assert [run.method for run in by_seed.values()] == ["kmeans", "kmeans codebook.sample=64"]
    assert chosen(runs, ["codebook=kmeans", "seed=2", "model=tiny_*", "codebook.sample=64"]) == [by_seed["2"]]
    assert chosen(runs, ["budget.bits_per_weight=2"], "score") == sorted(runs, key=lambda run: run.score)
    assert not chosen(runs, ["budget.bits_per_weight=3"])
    with pytest.raises(UserError, match=r"codebok: no run here has such a setting; is codebook meant\?"):
        chosen(runs, ["codebok=kmeans"])
    with pytest.raises(UserError, match="kmeans is no filter"):
        chosen(runs, ["kmeans"])
    assert find_run(runs[0].id[:12], results / "runs").id == runs[0].id
    numbered = [replace(run, settings={"codebook": {"seed": seed}}) for run, seed in zip(runs * 2, (10, 2, 1, 0), strict=True)]
    assert [run.seed for run in chosen(numbered, (), "seed")] == ["0", "1", "2", "10"]
    for name, words in (("", "begins so"), ("zz", "begins so")):
        with pytest.raises(UserError, match=words):
            find_run(name, results / "runs")
    differing = {line[0]: line[1:] for line in settings_that_differ(by_seed["1"], by_seed["2"])}
    assert differing["codebook.sample"][1] == "64"
    assert set(differing) == {"codebook.sample", "codebook.seed"}
    told = {line[0]: line[1:] for line in metrics_that_differ(by_seed["1"], by_seed["2"])}
    assert float(told["loss/answer"][2]) == pytest.approx(
        by_seed["2"].metrics["loss/answer"] - by_seed["1"].metrics["loss/answer"], rel=1e-3
    )


def test_two_thousand_runs_are_listed_fast(results: Path, tmp_path: Path) -> None:
    (source,) = list((results / "runs").iterdir())[:1]
    for number in range(2000):
        folder = tmp_path / f"{number:016x}"
        folder.mkdir()
        for name in ("DONE", "identity.json", "metrics.json"):
            (folder / name).hardlink_to(source / name)
    began = time.process_time()
    runs, _, _ = read_runs(tmp_path)
    chosen(runs, ["method=kmeans*"], "score")
    assert len({(run.id, run.method, run.seed, run.date) for run in runs}) == 2000
    assert time.process_time() - began < 10


def test_the_commands_print_what_was_asked_for(results: Path) -> None:
    ids = sorted(path.name for path in (results / "runs").iterdir())
    listed = run_command("mgvq.cli.runs", "list", "codebook.sample=64", "--csv", results=results)
    header, line = listed.stdout.splitlines()
    assert header == "run,date,model,method,seed,bits,score,of"
    assert "tiny_internvl,kmeans codebook.sample=64,2," in line
    assert listed.stderr == "1 of 2 runs, 0 left out\n"
    different = run_command("mgvq.cli.runs", "diff", *ids, results=results).stdout
    assert "codebook.sample" in different
    assert "provenance: alike" in different
    assert "model.weights" in run_command("mgvq.cli.runs", "show", ids[0][:9], results=results).stdout
    packed = run_command("mgvq.cli.runs", "pack", ids[0], results=results).stdout.strip()
    checked = run_command("mgvq.cli.runs", "check", packed, results=results, check=False)
    assert checked.returncode == 1
    assert "MISSING: CARD.md has answers to fill in" in checked.stdout


def faults(path: Path) -> list[str]:
    return [f"{found.kind} {found.text}" for found in check_sent(path) if found.kind != "NOTE"]


def test_what_was_sent_is_checked(results: Path, tmp_path: Path) -> None:
    run = chosen(read_runs(results / "runs")[0], ["seed=1"])[0]
    folder = pack(run, tmp_path)
    card = folder / "CARD.md"
    card.write_text(card.read_text().replace("TODO", "me | <b>here</b>"))
    (folder / "TRACKED").write_text("runs.csv\n")
    assert faults(folder) == []
    assert "here" in pack(run, tmp_path).joinpath("CARD.md").read_text(), "what was written by hand stays"
    archive = Path(shutil.make_archive(str(tmp_path / "sent"), "zip", tmp_path, folder.name))
    assert faults(archive) == []
    card.write_text(card.read_text().replace("| seed | 1 |", "| seed | 7 |"))
    assert faults(folder) == ["ALTERED CARD.md does not say what the files say: mgvq-runs pack writes that part anew."]
    pack(run, tmp_path)
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "tiny_vqa/accuracy": 0.99}))
    (folder / "extra").write_text("x")
    (folder / "config.yaml").unlink()
    assert {fault.split(":")[0] for fault in faults(folder)} == {
        "MISSING config.yaml",
        "ALTERED metrics.json is not the file that the run wrote.",
        "ALTERED extra was not written by the run",
    }


def test_new_digests_do_not_hide_an_altered_number_or_setting(results: Path, tmp_path: Path) -> None:
    run = chosen(read_runs(results / "runs")[0], ["seed=1"])[0]
    folder = pack(run, tmp_path)
    (folder / "metrics.json").write_text(json.dumps({**run.metrics, "tiny_vqa/accuracy": 0.99}))
    (folder / "identity.json").write_text(json.dumps({**run.settings, "outliers": 4.0}))
    (card := folder / "CARD.md").rename(tmp_path / "CARD.md")
    declare_done(folder)
    (tmp_path / "CARD.md").rename(card)
    found = faults(folder)
    assert any("the settings in identity.json are those of run" in fault for fault in found)
    assert any("tiny_vqa/accuracy is 0.99 in metrics.json, and the answers make" in fault for fault in found)


def test_records_are_checked_and_other_files_refused(tmp_path: Path) -> None:
    assert faults(ROOT / "results" / "records" / "e15_mgvq2_lm.parquet") == []
    (tmp_path / "a.txt").write_text("x")
    for path in (tmp_path / "a.txt", tmp_path / "gone", tmp_path):
        with pytest.raises(UserError, match=r"is no folder, no \.zip|has no DONE"):
            list(check_sent(path))
