"""Trackers: what they hold is what the run folder holds, and nothing that happens to them touches a run."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pandas as pd
import pytest
import yaml
from conftest import run_command
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore

from mgvq.errors import UserError
from mgvq.runs.store import RunFolder
from mgvq.runs.tracking import MARK, track
from mgvq.studies.plan import expand
from mgvq.studies.spec import Study
from mgvq.tracker.csv import Csv
from mgvq.tracker.wandb import Wandb, tags, variants

QUICK = ("method=kmeans", "scope=language", "codebook.sample=64", "evaluation.num_questions=8", "evaluation.answers=forced")
STUDY = """
name: quick
question: does it run?
common: [scope=language, evaluation.num_questions=8, evaluation.answers=forced]
arms: {'two bits, "k-means"': [method=kmeans, codebook.sample=64]}
seeds: [3]
"""
CLOSED = "http://127.0.0.1:9"
KEY = "0" * 40
METRICS = {"loss/answer": 0.5, "bits/model": 3.0, "flags": ["no_step"], "kl/full_precision": None}


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever the machine's state is: no key, no network, and no file in the home."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", CLOSED)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """The folder of a run whose compensation went block by block."""
    folder = RunFolder(tmp_path / "runs" / "0123456789abcdef")
    stages = {"codebook": "kmeans", "compensation": "gradient_hessian"}
    config = {
        "seed": 3, "scope": "language", "budget": {"bits_per_weight": 2.0}, "model": {"name": "tiny_internvl"},
    }  # fmt: skip
    blocks = pd.DataFrame(
        [("q", None, 0, 5.0, 0.0, True), ("a", 0.0, 0, 4.0, 0.5, False), ("a", 0.0, 1, 3.0, 0.25, True)],
        columns=["site", "block", "step", "heldout_loss", "first_order", "chosen"],
    ).assign(gradient_norm=1.0)
    with folder:
        folder.write_yaml("config.yaml", config)
        folder.write_json("identity.json", {"budget": config["budget"], **{s: {"variant": name} for s, name in stages.items()}})
        folder.write_json("provenance.json", {"commit": "c0ffee"})
        folder.write_json("metrics.json", METRICS)
        folder.write_table("layers.parquet", pd.DataFrame({"site": ["a", "q"], "block": [0.0, None], "error": [0.1, 0.2]}))
        folder.write_table("blocks.parquet", blocks)
        ledger = [("a", "language", True, 7), ("q", "language", True, 5), ("e", "vision", False, 100)]
        folder.write_table("ledger.parquet", pd.DataFrame(ledger, columns=["tensor", "part", "quantized", "num_bytes"]))
    return folder


def mirror(tmp_path: Path, **settings: Any) -> Wandb:
    defaults = {"path": str(tmp_path), "project": "p", "mode": "auto", "timeout_s": 5.0, "group": "study", "name": "arm, seed 3"}
    return Wandb(**{**defaults, **settings})


def offline_folders(results: Path) -> list[Path]:
    return sorted(results.glob("wandb/offline-run-*"))


def records(folder: Path) -> Iterator[Record]:
    """All that an offline folder would send, by W&B's own reader."""
    (file,) = folder.glob("*.wandb")
    store = DataStore()
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        yield Record.FromString(data)
    store.close()


def read_back(folder: Path) -> dict[str, Any]:
    """The run, its config, its summary as a user sets it, the rows of its history, its artifacts by type."""
    found: dict[str, Any] = {"config": {}, "summary": {}, "history": [], "artifacts": {}}
    for record in records(folder):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
            found["config"] |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
        elif kind == "config":
            found["config"] |= {i.key: json.loads(i.value_json) for i in record.config.update}
        elif kind == "summary":
            found["summary"] |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update}
        elif kind == "history":
            found["history"].append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
        elif kind == "artifact":
            found["artifacts"][record.artifact.type] = record.artifact
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            found["artifacts"][record.request.log_artifact.artifact.type] = record.request.log_artifact.artifact
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


def table(folder: Path, found: dict[str, Any], name: str) -> pd.DataFrame:
    path = next(row[f"table/{name}/path"] for row in found["history"] if f"table/{name}/path" in row)
    content = json.loads((folder / "files" / path).read_text())
    return pd.DataFrame(content["data"], columns=content["columns"])


def test_a_mirrored_run_is_read_back_whole(run: RunFolder, tmp_path: Path) -> None:
    track(mirror(tmp_path), run)
    (folder,) = offline_folders(tmp_path)
    found = read_back(folder)
    sent = found["run"]
    assert (sent.project, sent.run_group, sent.display_name) == ("p", "study", "arm, seed 3")
    assert sent.run_id == f"{run.path.name}-study-{sent.project}"
    assert set(sent.tags) == {"tiny_internvl", "language", "2 bits", "kmeans", "gradient_hessian"}
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    assert {key: found["config"][key] for key in config} == config
    assert found["config"]["provenance"] == {"commit": "c0ffee"}
    assert {key: found["summary"][key] for key in METRICS} == METRICS
    curve = [row["blocks/heldout_loss"] for row in found["history"] if "blocks/heldout_loss" in row]
    assert curve == [5.0, 3.0], "the steps that were chosen, in the order of the blocks"
    for name in ("layers", "blocks"):
        kept = pd.read_parquet(run.path / f"{name}.parquet")
        pd.testing.assert_frame_equal(table(folder, found, name), kept, check_dtype=False)
    ledger = json.loads(found["artifacts"]["checkpoint-ledger"].metadata)
    expected = {"bytes/language/quantized": 12, "bytes/vision/as it was": 100, "bits/model": 3.0, "tensors": 3}
    assert ledger == expected
    assert not found["artifacts"]["checkpoint-ledger"].manifest.contents, "figures, no weights"
    assert found["exit"] == 0


def test_a_run_is_told_once_a_place_and_again_where_the_mark_is_missing(run: RunFolder, tmp_path: Path) -> None:
    for _ in range(2):
        track(mirror(tmp_path), run)
    (first,) = offline_folders(tmp_path)
    track(mirror(tmp_path, group="another"), run)
    assert len(offline_folders(tmp_path)) == 2, "a run that two studies share is in both groups"
    (run.path / MARK).unlink()  # as a kill between telling and marking leaves it
    time.sleep(1)  # the folders' names have seconds
    track(mirror(tmp_path), run)
    assert len(offline_folders(tmp_path)) == 2
    assert not first.exists()


def test_csv_rows_come_once_whatever_the_mark_says(run: RunFolder, tmp_path: Path) -> None:
    tracker = Csv(path=str(tmp_path / "metrics.csv"))
    for _ in range(2):
        track(tracker, run)
        (run.path / MARK).unlink()
    rows = pd.read_csv(tracker.path)
    assert rows.metric.to_list() == list(run.metrics())
    assert set(rows.run) == {run.path.name}


def test_a_broken_tracker_is_a_warning_and_tried_again(run: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    track(mirror(tmp_path, path=str(tmp_path / "file")), run)
    assert "The run is complete" in caplog.text
    assert not (run.path / MARK).exists()
    assert run.is_done()


KILLED = """
import sys
from pathlib import Path
import psutil
from mgvq.runs.store import RunFolder
from mgvq.runs.tracking import track
from mgvq.tracker import wandb

figures = wandb._figures

def kill(*given):
    for child in psutil.Process().children(recursive=True):
        child.kill()
    return figures(*given)

run, path = sys.argv[1:]
tracker = wandb.Wandb(path=path, project="p", mode="offline", timeout_s=5.0, group=None, name="n")
wandb._figures = kill
track(tracker, RunFolder(Path(run)))
wandb._figures = figures
if (Path(run) / "TRACKED").exists():
    sys.exit("the run counts as told")
track(tracker, RunFolder(Path(run)))
"""


def test_a_killed_process_of_wandb_costs_a_line_and_is_told_again(run: RunFolder, tmp_path: Path) -> None:
    """In the middle of telling; and nothing of W&B's is left over that would fail when Python ends."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(run.path), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Sometimes W&B is in time for a line of its own.
    first, second = [line for line in done.stderr.splitlines() if line != "wandb: ERROR Problem finishing run"]
    assert first.startswith("tracker Wandb has not got")
    assert first.endswith("The run is complete; the same command tells it again.")
    assert "is not sent: tracker.mode=offline" in second
    assert run.is_done()
    run.verify()
    assert (run.path / MARK).is_file()
    (folder,) = offline_folders(tmp_path)
    assert read_back(folder)["exit"] == 0


class Busy(BaseHTTPRequestHandler):
    """A server that says that it is there, and to whatever else is asked of it that it is busy."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        self.send_response(503)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.slow
def test_a_study_names_its_runs_and_a_later_tracker_gets_the_finished_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line, logged in; nobody listens, or somebody who takes nothing: runs are done, and soon."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    results, study = tmp_path / "results", tmp_path / "study.yaml"
    study.write_text(STUDY)
    run_command("mgvq.cli.study", str(study), "--tracker", "wandb", results=results)
    (folder,) = offline_folders(results)
    found = read_back(folder)
    assert (found["run"].run_group, found["run"].display_name) == ("quick", 'two bits, "k-means", seed 3')
    run = RunFolder(results / "runs" / found["config"]["run"])
    assert found["summary"]["loss/answer"] == run.metrics()["loss/answer"]
    run_command("mgvq.cli.study", str(study), "--tracker", "csv", results=results)
    assert set(pd.read_csv(results / "metrics.csv").run) == {run.path.name}

    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        for url, project, obstacle in (
            (CLOSED, "first", f"{CLOSED} does not answer (ConnectionError)"),
            (f"http://127.0.0.1:{server.server_port}", "second", "it took more than tracker.timeout_s=3"),
        ):
            monkeypatch.setenv("WANDB_BASE_URL", url)
            start = time.monotonic()
            told = ("tracker=wandb", f"tracker.project={project}", "tracker.timeout_s=3")
            again = run_command("mgvq.cli.run", *QUICK, "seed=3", *told, results=results)
            assert time.monotonic() - start < 60, "the limits, and importing wandb, on a machine with other work"
            assert "done before" in again.stdout
            assert f"{obstacle}. This sends it: wandb sync {results}/wandb/offline-run-" in again.stderr
            assert len(again.stderr.splitlines()) == 1
            assert Path(again.stdout.splitlines()[-1]).is_dir()
        server.shutdown()


def test_labels_are_no_part_of_a_runs_identity() -> None:
    study = Study(name="s", question="?", arms={"a": ["method=kmeans"]}, seeds=[0])
    assert expand(study)[0].folder.path == expand(study, ["tracker=wandb"])[0].folder.path


def test_variants_are_what_was_done_not_what_was_asked_for() -> None:
    nothing = {"budget": {"bits_per_weight": None}, "model": {"name": "m"}, "scope": "all"}
    assert variants(nothing) == ["full_precision"]
    assert tags(nothing, nothing) == ["m", "all", "full_precision"]
    theirs = {"codebook": {"variant": "grid", "group_size": 256.0}, "sensitivity": {"variant": "theirs.loud.Loud (theirs 1.2)"}}
    assert variants({**theirs, "evaluation": {"variant": "tiny_vqa"}}) == ["grid", "theirs.loud.Loud"]


@pytest.mark.parametrize(("setting", "value"), [("mode", "on"), ("timeout_s", 0.0)])
def test_a_bad_setting_is_named(setting: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"tracker\\.{setting}.*{value!r}"):
        mirror(tmp_path, **{setting: value})
