"""`mgvq-run` from the command line: folder, figures, bytes, resumption, and what people see when they err."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, run_command, sampled
from PIL import Image

import mgvq
from mgvq.analysis.tables.bits import bits_by_kind
from mgvq.errors import UserError
from mgvq.runs.store import RunFolder

RUN = "mgvq.cli.run"
QUICK = ("method=kmeans", "scope=language", "codebook.sample=64", "evaluation.num_questions=8", "evaluation.answers=forced")


def checkpoint_bytes(run: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted((run / "checkpoint").iterdir())}


def test_equal_settings_give_equal_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    runs = [
        Path(run_command(RUN, *QUICK, f"seed={seed}", results=tmp_path / place).stdout.splitlines()[-1])
        for seed, place in ((0, "a"), (0, "b"), (1, "b"))
    ]
    first, second, other = map(checkpoint_bytes, runs)
    assert first == second
    assert first["mgvq.safetensors"] != other["mgvq.safetensors"]
    assert runs[0].name == runs[1].name != runs[2].name


@pytest.mark.parametrize("waiting_for", sampled(["identity.json", "checkpoint", "ledger.parquet"], 1))
def test_a_killed_run_is_no_result_and_its_rerun_completes(waiting_for: str, tmp_path: Path) -> None:
    """`kill -9` as soon as a file appears: before the model loads, while the checkpoint is written, before the evaluation."""
    environment = {**os.environ, "MGVQ_RESULTS": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", RUN, *QUICK], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not list(tmp_path.glob(f"runs/*/{waiting_for}")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder,) = (f for f in (tmp_path / "runs").iterdir() if f.name != ".locks")
    assert not (folder / "DONE").exists()
    again = run_command(RUN, *QUICK, results=tmp_path)
    assert again.stdout.splitlines()[-1] == str(folder)
    assert (folder / "DONE").exists()


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    """The second waits, and then finds the run done."""
    folder = RunFolder(tmp_path / "runs" / "some")
    second: list[bool] = []

    def enter() -> None:
        with RunFolder(folder.path) as same:
            second.append(same.is_done())

    thread = threading.Thread(target=enter)
    with folder:
        folder.write_json("metrics.json", {"bits": 2})
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join()
    assert second == [True]
    assert folder.metrics() == {"bits": 2}


def test_a_finished_folder_stays_as_it_is_whatever_fails_in_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "some")
    with folder:
        folder.write_json("metrics.json", {})
    with pytest.raises(RuntimeError), folder:
        raise RuntimeError("another process looks at it")
    assert sorted(f.name for f in folder.path.iterdir()) == ["DONE", "metrics.json"]


def test_a_failed_run_keeps_its_traceback_and_is_no_result(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "some")

    def fail() -> None:
        with folder:
            folder.write_json("metrics.json", {})
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        fail()
    assert "in the middle" in (folder.path / "FAILED").read_text()
    with pytest.raises(UserError, match="not finished"):
        folder.metrics()
    with folder:
        assert [f.name for f in folder.path.iterdir()] == []


def test_a_sweep_runs_every_combination_and_outlives_a_bad_one(tmp_path: Path) -> None:
    swept = run_command(RUN, "-m", *QUICK, "budget.bits_per_weight=2,9,3", results=tmp_path, check=False)
    assert swept.returncode == 1
    assert "budget.bits_per_weight=9" in swept.stderr
    assert "Traceback" not in swept.stderr
    assert len(list(tmp_path.glob("runs/*/DONE"))) == 2


def test_csv_tracker_mirrors_the_metrics(tmp_path: Path) -> None:
    done = run_command(RUN, *QUICK, "tracker=csv", results=tmp_path)
    rows = pd.read_csv(tmp_path / "metrics.csv")
    metrics = json.loads((Path(done.stdout.splitlines()[-1]) / "metrics.json").read_text())
    assert set(rows.metric) == set(metrics)
    assert float(rows[rows.metric == "loss/answer"].value.iloc[0]) == metrics["loss/answer"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["codebok=kmeans"], "codebok"),
        (["codebook.vector_lenght=4"], "vector_lenght"),
        (["codebook=kmean"], "kmean"),
        (["model=local", "model.path=/no/such/folder"], "/no/such/folder"),
        (["budget.bits_per_weight=0"], "budget.bits_per_weight=0"),
        (["method=rtn", "budget.bits_per_weight=9"], "budget.bits_per_weight=9"),
        (["method=rtn", "calibration.num_images=3"], "num_images"),
        (["budget.bits_per_weight=0.1"], "smallest rate"),
    ],
)
def test_errors_are_one_paragraph(arguments: list[str], named: str, tmp_path: Path) -> None:
    done = run_command(RUN, *arguments, results=tmp_path, check=False)
    assert done.returncode in (1, 2)
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("runs/*/DONE"))


def test_bad_calibration_data_is_named_before_the_model_loads(tmp_path: Path) -> None:
    """Other faults of rows: tests/cases/test_rows.py."""
    rows = tmp_path / "rows.jsonl"
    weighted = ("method=kmeans", "codebook.weight_power=0.5", "curvature=input", "calibration=image_text",
                f"calibration.path={rows}", "calibration.num_samples=1", "calibration.heldout_samples=0")  # fmt: skip

    (tmp_path / "note.png").write_text("this is text")
    rows.write_text('{"image": "note.png", "question": "what is it ?", "answer": "text"}\n')
    done = run_command(RUN, *weighted, results=tmp_path, check=False)
    assert done.returncode == 2
    assert "note.png cannot be read as an image" in done.stderr
    assert "Traceback" not in done.stderr
    assert "loading" not in done.stderr


def test_local_model_and_local_calibration_data(tmp_path: Path) -> None:
    """What a user brings: a model folder in the hub's format, and image-text rows; the activations weigh the codebook."""
    shutil.copytree(ROOT / "mgvq/model/tiny/tiny_internvl", tmp_path / "mine")
    rows = []
    for number in range(6):
        Image.effect_noise((64, 64), 20 + number).convert("RGB").save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "how many things are there ?", "answer": "two"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    calibration = ("calibration=image_text", f"calibration.path={tmp_path}/rows.jsonl", "calibration.num_samples=4",
                   "calibration.heldout_samples=2", "curvature=input", "codebook.weight_power=0.5")  # fmt: skip
    done = run_command(RUN, "model=local", f"model.path={tmp_path}/mine", *QUICK, *calibration, results=tmp_path)
    metrics = json.loads((Path(done.stdout.splitlines()[-1]) / "metrics.json").read_text())
    assert metrics["time/calibrate_s"] > 0
    plain = run_command(RUN, "model=local", f"model.path={tmp_path}/mine", *QUICK, results=tmp_path)
    other = json.loads((Path(plain.stdout.splitlines()[-1]) / "metrics.json").read_text())
    assert metrics["checkpoint_sha256"] != other["checkpoint_sha256"]


@pytest.mark.trust
def test_conversations_from_a_file_calibrate_a_whole_run(tmp_path: Path) -> None:
    """Of text alone, of one image and of two in one set; the statistics weigh the codebooks."""
    rows = ROOT / "tests/data/calibration/chat.jsonl"
    few = ("model=tiny_llava_onevision", *QUICK, "calibration=chat", f"calibration.path={rows}", "calibration.num_samples=5",
           "calibration.heldout_samples=1", "curvature=input", "codebook.weight_power=0.5")  # fmt: skip
    done = run_command(RUN, *few, results=tmp_path)
    metrics = json.loads((Path(done.stdout.splitlines()[-1]) / "metrics.json").read_text())
    assert len(list((tmp_path / "cache" / "statistics").glob("*.safetensors"))) == 1
    assert metrics["bits/quantized_layers"] <= 2.02
    assert not [flag for flag in metrics["flags"] if flag.startswith("non_finite")]


def test_mixed_precision_from_statistics_to_checkpoint(tmp_path: Path) -> None:
    """The whole first half of the method; a second run with another sensitivity takes the statistics from the cache."""
    few = ("method=mgvq_no_gradient", "scope=language", "calibration.num_images=2", "calibration.heldout_images=1",
           "codebook.iterations=2", "evaluation.num_questions=8", "evaluation.answers=forced")  # fmt: skip
    done = run_command(RUN, *few, results=tmp_path)
    run = Path(done.stdout.splitlines()[-1])
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["bits/quantized_layers"] == pytest.approx(2.0, abs=0.01)
    assert metrics["bits/quantized_layers"] <= 2.0
    assert metrics["rate"] == "mixed"
    slices = pd.read_parquet(run / "allocation.parquet")
    assert slices.groupby("site").group.nunique().eq(4).all()
    assert slices.index_bits.nunique() > 3
    channels = pd.read_parquet(run / "channels.parquet")
    assert set(channels.site) == set(slices.site)
    groups = {site: tuple(part.group) for site, part in channels.groupby("site")}
    attention = [site for site in groups if ".layers.0.self_attn." in site and "o_proj" not in site]
    assert len(attention) == 3
    assert len({groups[site] for site in attention}) == 1, "q, k and v read the same activations"
    assert pd.read_parquet(run / "layers.parquet").proxy_error.between(0, 1).all()
    kinds = bits_by_kind(run)
    assert sum(kinds["stored bits"] * kinds["M weights"]) / kinds["M weights"].sum() == pytest.approx(
        metrics["bits/quantized_layers"]
    )
    assert (kinds["times the limit"] > 1).all()
    assert all(f"{kind} " in done.stdout for kind in kinds.kind)
    assert "times the limit\n" in done.stdout
    (cached,) = (tmp_path / "cache" / "statistics").glob("*.safetensors")
    stamp = cached.stat().st_mtime_ns
    run_command(RUN, *few, "sensitivity=wanda", results=tmp_path)
    assert cached.stat().st_mtime_ns == stamp
    assert len(list((tmp_path / "cache" / "statistics").glob("*.safetensors"))) == 1


def test_a_rotated_lattice_with_outliers_and_rounded_embeddings(tmp_path: Path) -> None:
    """Everything that lies around a code at once: stored, counted, loaded back, and left out one by one."""
    few = ("calibration=tiny_vqa", "curvature=input", "transform=hadamard", "codebook=lattice", "compensation=hessian",
           "scope=language", "budget.bits_per_weight=2.1", "outliers=3", "embedding_bits=8", "calibration.num_images=2",
           "calibration.heldout_images=1", "evaluation.num_questions=8", "evaluation.answers=forced")  # fmt: skip
    done = run_command(RUN, *few, results=tmp_path)
    run = Path(done.stdout.splitlines()[-1])
    metrics = json.loads((run / "metrics.json").read_text())
    layers, ledger = pd.read_parquet(run / "layers.parquet"), pd.read_parquet(run / "ledger.parquet")
    assert metrics["rate"] == "8x65536"
    assert 2.0 < metrics["bits/quantized_layers"] < 2.1
    assert (layers.bits * layers.num_weights).sum() / layers.num_weights.sum() == pytest.approx(metrics["bits/quantized_layers"])
    assert (layers.times_limit > 1.3).all(), "E8P alone loses 1.46"
    assert layers.relative_error.between(0.05, 0.5).all()
    assert ledger.tensor.str.endswith(".outlier_values").sum() == len(layers)
    assert (ledger[ledger.tensor.str.endswith(".outlier_values")].num_bytes == 2 * 3).all()
    (embedding,) = ledger[ledger.tensor.str.endswith("embed_tokens.codes")].itertuples()
    assert (embedding.num_bytes, embedding.quantized) == (embedding.num_weights, False)
    packed, decoded = (mgvq.load(run / "checkpoint", packed=packed) for packed in (True, False))
    site = layers.site[0]
    assert torch.equal(packed.get_submodule(site).weight, decoded.get_parameter(f"{site}.weight"))


@pytest.mark.trust
def test_the_gradient_term_is_all_that_parts_gradient_hessian_from_hessian(tmp_path: Path) -> None:
    """One override apart: without a step the same bytes, and flagged; with steps a choice on held-out samples in every block."""
    few = ("method=kmeans_ldlq", "scope=language", "calibration.num_images=2", "calibration.heldout_images=2",
           "codebook.iterations=2", "evaluation.num_questions=8", "evaluation.answers=forced")  # fmt: skip
    runs = [
        Path(run_command(RUN, *few, *more, results=tmp_path).stdout.splitlines()[-1])
        for more in (
            [],
            ["compensation=gradient_hessian", "compensation.start=full_precision", "compensation.steps=[0.0]"],
            ["compensation=gradient_hessian", "compensation.start=full_precision", "compensation.sweeps=2", "refit=closed_form"],
        )
    ]
    plain, still, moved = (checkpoint_bytes(run)["mgvq.safetensors"] for run in runs)
    assert plain == still != moved
    flags = [json.loads((run / "metrics.json").read_text())["flags"] for run in runs]
    assert "no_step" in flags[1]
    assert "no_step" not in flags[0]
    blocks = pd.read_parquet(runs[2] / "blocks.parquet")
    first, second = (blocks[blocks.sweep == sweep] for sweep in (0, 1))
    assert first.groupby("block").chosen.sum().eq(1).all()
    assert first[first.block == 0].step.tolist() == [0], "nothing has drifted before the first block is quantised"
    assert first.loc[first.groupby("block").heldout_loss.idxmin()].chosen.all()
    assert (second[second.chosen].heldout_loss < second[second.chosen].heldout_before).all()
    assert second.groupby("block").chosen.sum().le(1).all()
    for _, tried in blocks.groupby(["sweep", "block"]):
        assert tried.heldout_loss[:-1].is_monotonic_decreasing, "the first that is worse is the last"
    assert not (runs[0] / "blocks.parquet").exists()
    proxy = pd.read_parquet(runs[2] / "proxy.parquet").pivot(index="site", columns="part", values="proxy_error")
    assert {"nearest", "refit"} <= set(proxy) <= {"nearest", "feedback", "shifted", "refit"}
    assert proxy.notna().all(axis=1).sum() < len(proxy), "a layer was rounded to its weights or to a moved target, not both"
    plain_proxy = pd.read_parquet(runs[0] / "proxy.parquet").pivot(index="site", columns="part", values="proxy_error")
    assert (plain_proxy.feedback < plain_proxy.nearest).mean() > 0.9
