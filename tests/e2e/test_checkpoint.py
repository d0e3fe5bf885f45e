"""What a finished run leaves: folder, figures, and a checkpoint from whose packed bytes `mgvq.load` makes the model again."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from asked_models import answers
from conftest import ROOT, run_command
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import mgvq
from mgvq.checkpoint.index import read_index, to_bytes
from mgvq.checkpoint.save import save
from mgvq.data.tiny_vqa.dataset import draw_test
from mgvq.data.tiny_vqa.questions import TRAINING_MIX
from mgvq.errors import UserError
from mgvq.export.folder import export
from mgvq.model.encode import chat_prompt
from mgvq.model.files import INDEX
from mgvq.model.sites import list_sites

KEYS = {
    "tiny_vqa/accuracy", "tiny_vqa/unparsed", "loss/answer", "kl/full_precision", "bits/quantized_layers", "bits/language_model",
    "bits/model", "bytes/checkpoint", "time/calibrate_s", "time/quantize_s", "time/evaluate_s", "memory/peak_gb", "flags",
    "schema_version",
}  # fmt: skip


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics) >= KEYS
    assert metrics["schema_version"] == 1
    assert {f"tiny_vqa/accuracy/{kind}" for kind in TRAINING_MIX} <= set(metrics)
    assert metrics["bits/quantized_layers"] == pytest.approx(2.0, abs=0.02)
    assert 2 < metrics["bits/language_model"] < 16
    assert 2 < metrics["bits/model"] < 16
    assert metrics["kl/full_precision"] > 0
    samples = pd.read_parquet(finished / "samples.parquet")
    assert len(samples) == 52 == samples.sample_id.nunique()
    assert {"task", "sample_id", "sample_hash", "type", "prediction", "score"} <= set(samples)
    done = json.loads((finished / "DONE").read_text())
    assert {"metrics.json", "config.yaml", "identity.json", "provenance.json", "checkpoint/mgvq.safetensors"} <= set(done)


def test_the_ledger_is_the_bytes_on_disk(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    ledger = pd.read_parquet(finished / "ledger.parquet")
    stored = sum((finished / "checkpoint" / name).stat().st_size for name in ("mgvq.safetensors", "mgvq.index"))
    assert ledger.num_bytes.sum() == stored == metrics["bytes/checkpoint"]
    scope = ledger[ledger.quantized]
    assert metrics["bits/quantized_layers"] == pytest.approx(8 * scope.num_bytes.sum() / scope.num_weights.sum())


def test_a_finished_run_is_skipped_and_named(finished: Path) -> None:
    model = json.loads((finished / "identity.json").read_text())["model"]["name"]
    words = (f"model={model}", "method=kmeans", "evaluation.num_questions=52")
    left = finished.parents[1] / "partial" / finished.name  # by a run that was killed behind DONE
    left.mkdir(parents=True)
    again = run_command("mgvq.cli.run", *words, results=finished.parents[1])
    assert again.stdout.splitlines()[0].startswith("done before")
    assert not left.exists()
    assert again.stdout.splitlines()[-1] == str(finished)


def test_it_generates_what_the_run_recorded(finished: Path) -> None:
    model, processor = mgvq.load(finished / "checkpoint"), AutoProcessor.from_pretrained(finished / "checkpoint")
    processor.tokenizer.padding_side = "left"
    samples = pd.read_parquet(finished / "samples.parquet")
    expected = samples.prediction[samples.sample_id.str.endswith("-0")].tolist()
    found = [a.strip() for a in answers(model, processor, 52)]
    assert found == expected


def test_packed_layers_compute_the_same(finished: Path) -> None:
    decoded, packed = mgvq.load(finished / "checkpoint"), mgvq.load(finished / "checkpoint", packed=True)
    processor = AutoProcessor.from_pretrained(finished / "checkpoint")
    processor.tokenizer.padding_side = "left"
    assert answers(decoded, processor) == answers(packed, processor)
    held, unpacked = (sum(t.nbytes for t in [*m.parameters(), *m.buffers()]) for m in (packed, decoded))
    assert held < 0.25 * unpacked


def test_unquantised_checkpoint_is_the_model_again(loaded, tmp_path: Path) -> None:
    sites = list_sites(loaded.model, "all")
    ledger = save(tmp_path / "checkpoint", loaded, sites, {})
    again = mgvq.load(tmp_path / "checkpoint").state_dict()
    assert ledger.bits()["bits/quantized_layers"] == 16
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(again[name], tensor), name


def test_transformers_reads_it_packed(finished: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(finished / "checkpoint", dtype=torch.float32).state_dict()
    packed = mgvq.load(finished / "checkpoint", packed=True).state_dict()
    assert model.keys() == packed.keys()
    assert all(torch.equal(tensor, packed[name]) for name, tensor in model.items())


def test_the_card_has_the_numbers_of_the_run(finished: Path) -> None:
    metrics, card = json.loads((finished / "metrics.json").read_text()), (finished / "checkpoint" / "README.md").read_text()
    assert card.startswith('---\nlicense: "apache-2.0"\n')
    for name in ("bits/quantized_layers", "bits/language_model", "bits/model", "tiny_vqa/accuracy", "loss/answer"):
        assert f"| {metrics[name]:.4f}" in card, name
    assert "full precision" in card


def test_exported_it_is_a_model_like_any_other(finished_runs: dict[str, Path], tmp_path: Path) -> None:
    run = finished_runs["tiny_internvl"]
    done = export(run / "checkpoint", tmp_path / "plain", "bf16")
    exported = AutoModelForImageTextToText.from_pretrained(done.folder, dtype="auto")
    ours = mgvq.load(run / "checkpoint", dtype=torch.bfloat16)
    assert exported.dtype == torch.bfloat16
    assert not hasattr(exported.config, "quantization_config")
    processor = AutoProcessor.from_pretrained(done.folder)
    picture = draw_test("test", 0, 1)[0]
    prompt = chat_prompt(processor, picture.questions[0].text)
    inputs = processor(images=[picture.pixels], text=[prompt], return_tensors="pt").to(torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(exported(**inputs).logits, ours(**inputs).logits)


TASK = """
task: two_questions
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.images
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 32, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
FUNCTIONS = """
import io
from PIL import Image

def images(doc):
    return [Image.open(io.BytesIO(doc["bytes"])).convert("RGB")]
"""


@pytest.mark.trust
def test_lmms_eval_asks_it_by_its_own_command(finished_runs: dict[str, Path], tmp_path: Path) -> None:
    """The entry point is what installing writes down, so that it is written down here where the code is not installed."""
    site = tmp_path / "site" / "mgvq_here-0.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: mgvq-here\nVersion: 0\n")
    (site / "entry_points.txt").write_text("[lmms_eval.models]\nmgvq = mgvq.export.plugin:MANIFEST\n")
    run = finished_runs["tiny_internvl"]
    samples = pd.read_parquet(run / "samples.parquet")
    rows = []
    for picture in draw_test("test", 0, 8)[:2]:
        Image.fromarray(picture.pixels).save(tmp_path / "a.png")
        rows.append({"bytes": (tmp_path / "a.png").read_bytes(), "question": picture.questions[0].text, "answer": "2"})
    (tmp_path / "tasks").mkdir()
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "tasks" / "two_questions.yaml").write_text(TASK.format(tmp_path / "rows.parquet"))
    (tmp_path / "tasks" / "functions.py").write_text(FUNCTIONS)
    words = f"--model mgvq --model_args pretrained={run}/checkpoint --tasks two_questions --include_path {tmp_path}/tasks"
    words += f" --batch_size 2 --log_samples --output_path {tmp_path}/out"
    paths = os.pathsep.join([str(ROOT), str(site.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "lmms_eval", *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (log,) = (tmp_path / "out").rglob("*samples_two_questions.jsonl")
    told = [json.loads(line) for line in log.read_text().splitlines()]
    expected = [samples[samples.sample_id.str.endswith("-0")].prediction.iloc[number] for number in range(2)]
    assert [line["filtered_resps"] for line in sorted(told, key=lambda line: line["doc_id"])] == expected


def test_damage_is_named(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no mgvq checkpoint"):
        mgvq.load(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(finished / "checkpoint", broken)
    index = read_index(broken / INDEX)
    name, layer = next(iter(index.layers.items()))
    gone = replace(index, layers={**index.layers, name: replace(layer, tensors={**layer.tensors, "codes": "gone"})})
    (broken / INDEX).write_bytes(to_bytes(gone))
    with pytest.raises(UserError, match=r"mgvq\.index altered"):
        mgvq.load(broken)
    with pytest.raises(UserError, match=name):
        mgvq.load(broken, verify=False)
    (broken / INDEX).write_bytes(b"MGVQ" + (99).to_bytes(4, "little"))
    with pytest.raises(UserError, match="version 99"):
        mgvq.load(broken)
