"""What a finished run leaves: folder, figures, and a checkpoint from whose packed bytes `mgvq.load` makes the model again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import run_command
from transformers import AutoModelForImageTextToText, AutoProcessor

import mgvq
from mgvq.checkpoint.index import read_index, to_bytes
from mgvq.checkpoint.save import save
from mgvq.data.tiny_vqa.dataset import draw_test
from mgvq.data.tiny_vqa.questions import QUESTION_TYPES
from mgvq.errors import UserError
from mgvq.model.encode import chat_prompt
from mgvq.model.files import INDEX
from mgvq.model.sites import list_sites

KEYS = {
    "tiny_vqa/accuracy", "tiny_vqa/unparsed", "loss/answer", "kl/full_precision", "bits/quantized_layers", "bits/language_model",
    "bits/model", "bytes/checkpoint", "time/calibrate_s", "time/quantize_s", "time/evaluate_s", "memory/peak_gb", "flags",
    "schema_version",
}  # fmt: skip


def ask(model, processor, questions: int = 4) -> list[str]:
    pictures = draw_test("test", 0, questions)
    texts = [chat_prompt(processor, p.questions[0].text) for p in pictures]
    inputs = processor(images=[p.pixels for p in pictures], text=texts, return_tensors="pt", padding=True)
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return processor.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics) >= KEYS
    assert metrics["schema_version"] == 1
    assert {f"tiny_vqa/accuracy/{kind}" for kind in QUESTION_TYPES} <= set(metrics)
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
    again = run_command("mgvq.cli.run", *words, results=finished.parents[1])
    assert again.stdout.splitlines()[0].startswith("done before")
    assert again.stdout.splitlines()[-1] == str(finished)


def test_it_generates_what_the_run_recorded(finished: Path) -> None:
    model, processor = mgvq.load(finished / "checkpoint"), AutoProcessor.from_pretrained(finished / "checkpoint")
    processor.tokenizer.padding_side = "left"
    samples = pd.read_parquet(finished / "samples.parquet")
    expected = samples.prediction[samples.sample_id.str.endswith("-0")].tolist()
    answers = [a.strip() for a in ask(model, processor, 52)]
    assert answers == expected


def test_packed_layers_compute_the_same(finished: Path) -> None:
    decoded, packed = mgvq.load(finished / "checkpoint"), mgvq.load(finished / "checkpoint", packed=True)
    processor = AutoProcessor.from_pretrained(finished / "checkpoint")
    processor.tokenizer.padding_side = "left"
    assert ask(decoded, processor) == ask(packed, processor)
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
