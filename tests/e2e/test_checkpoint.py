"""What a finished run leaves: folder, figures, and a checkpoint from whose packed bytes `mgvq.load` makes the model again."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import FAMILIES, ROOT, run_command
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM

import mgvq
from mgvq.checkpoint.index import read_index, to_bytes
from mgvq.checkpoint.save import save
from mgvq.cli import ask as asking
from mgvq.data.tiny_vqa.dataset import draw_test
from mgvq.data.tiny_vqa.questions import TRAINING_MIX
from mgvq.errors import UserError
from mgvq.export.folder import export
from mgvq.model import ask as single
from mgvq.model.encode import chat_prompt
from mgvq.model.files import INDEX
from mgvq.model.sites import list_sites
from mgvq.model.source import SHIPPED
from mgvq.runs.api import Quantized, _folder

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


def one_of_them(name: str):
    """The smallest model for `make test`, the others for `make trust`."""
    return pytest.param(name, marks=() if name == "tiny_internvl" else pytest.mark.trust)


def said(capsys, monkeypatch, *words: object) -> list[str]:
    """The lines that `mgvq-ask` prints."""
    monkeypatch.setattr(sys, "argv", ["mgvq-ask", *map(str, words)])
    asking.main()
    return capsys.readouterr().out.splitlines()


def test_a_question_in_the_place_of_an_image_is_told() -> None:
    """However long it is: no file has such a name."""
    for words in ("what is this?", 60 * "what is "):
        with pytest.raises(UserError, match=r"is no file: give an image|cannot be read as an image"):
            asking._opened(lambda _: pytest.fail("it is read"), words)


@pytest.mark.parametrize("token", ["<|im_end|>", "<pad>", "</img>", "<image>"])
def test_a_question_with_a_special_token_is_not_asked(token: str, finished_runs: dict[str, Path]) -> None:
    checkpoint = finished_runs["tiny_internvl"] / "checkpoint"
    model, processor = mgvq.load(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    with pytest.raises(UserError, match=rf"the question: '{re.escape(token)}' in a text is a special token"):
        single.ask(model, processor, f"what is {token} this?", Image.new("RGB", (64, 64)), 4)
    with pytest.raises(UserError, match=rf"the question: '{re.escape(token)}' in a text is a special token"):
        single.ask(text_model(), processor.tokenizer, f"what is {token} this?", None, 4)


@pytest.mark.parametrize("name", map(one_of_them, FAMILIES))
def test_the_command_answers_as_the_run_did(
    name: str, finished_runs: dict[str, Path], tmp_path: Path, capsys, monkeypatch
) -> None:
    run, first, second = finished_runs[name], *draw_test("test", 0, 8)[:2]
    for letter, picture in (("a", first), ("b", second)):
        Image.fromarray(picture.pixels).save(tmp_path / f"{letter}.png")
    samples = pd.read_parquet(run / "samples.parquet")
    answers = {(row.sample_id.rpartition("-")[0], row.question): row.prediction for row in samples.itertuples()}
    places = samples.sample_id.str.rpartition("-")[0].unique()
    asked = [(place, picture.questions[0].text) for place, picture in zip(places, (first, second), strict=False)]
    a, b = (answers[key] for key in asked)
    images = "\n".join(f"@{place}" for place in (tmp_path / "none.png", 60 * "what is ", tmp_path / "b.png"))  # two are none
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{asked[0][1]}\n{images}\n{asked[1][1]}\n\n"))
    assert said(capsys, monkeypatch, run, tmp_path / "a.png") == [a, b]

    processor = AutoProcessor.from_pretrained(SHIPPED / name)
    processor.tokenizer.padding_side = "left"
    (full,) = ask(AutoModelForImageTextToText.from_pretrained(SHIPPED / name, dtype=torch.float32), processor, 1)
    quantised, reference = said(capsys, monkeypatch, run, tmp_path / "a.png", asked[0][1], "--compare")
    assert quantised.startswith(f"quantised       {a}   (")
    assert reference.startswith(f"full precision  {full.strip()}   (")


def test_the_lines_of_the_readme_answer(finished_runs: dict[str, Path], tmp_path: Path, capsys, monkeypatch) -> None:
    run = finished_runs["tiny_internvl"]
    picture = draw_test("test", 0, 1)[0]
    Image.fromarray(picture.pixels).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    lines = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(lines.replace("results/runs/<id>", str(run)), {})
    by_lines = capsys.readouterr().out.splitlines()
    assert by_lines == said(capsys, monkeypatch, run, "a.png", "how many things are there ?")
    assert len(by_lines) == 1
    assert by_lines[0]


def shipped() -> tuple:
    """A model and its processor, as anyone loads them."""
    source = SHIPPED / "tiny_internvl"
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(source)


def test_quantised_in_python_it_has_the_bytes_of_the_run(finished_runs: dict[str, Path], tmp_path: Path) -> None:
    run, source = finished_runs["tiny_internvl"] / "checkpoint", SHIPPED / "tiny_internvl"
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32),
        AutoProcessor.from_pretrained(source),
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = mgvq.quantize(model, processor, method="kmeans", bits=2.0, seed=0)
    saved = made.save(tmp_path / "checkpoint")
    for name in ("mgvq.safetensors", "mgvq.index", "generation_config.json", "tokenizer.json", "processor_config.json"):
        assert (saved / name).read_bytes() == (run / name).read_bytes(), name
    assert made.ledger.bits() == {key: json.loads((run.parent / "metrics.json").read_text())[key] for key in made.ledger.bits()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert ask(made.model, made.processor) == ask(mgvq.load(run), made.processor)
    assert 'license: "apache-2.0"' in (saved / "README.md").read_text()
    told, of_the_run = (
        json.loads((folder / "config.json").read_text())["quantization_config"]["provenance"]["settings"]
        for folder in (saved, run)
    )
    assert told.pop("model") == {"name": "tiny_internvl", "dtype": "float32"}
    assert of_the_run.pop("model")["name"] == "tiny_internvl"
    assert told == of_the_run
    with pytest.raises(UserError, match="is there already"):
        made.save(saved)


@pytest.mark.trust
def test_with_samples_too_it_has_the_bytes_of_the_run(tmp_path: Path) -> None:
    from mgvq.calibration.tiny_vqa import TinyVQA

    words = ("method=kmeans_ldlq", "scope=language", "calibration.num_images=2", "calibration.heldout_images=1", "seed=3")
    run_command("mgvq.cli.run", "model=tiny_internvl", *words, "evaluation.num_questions=13", results=tmp_path)
    (run,) = (done.parent for done in tmp_path.glob("runs/*/DONE"))
    source = SHIPPED / "tiny_internvl"
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32),
        AutoProcessor.from_pretrained(source),
    )
    drawn = TinyVQA(num_images=2, questions_per_image=8, heldout_images=1, shown="both", seed=3, label_seed=3).draw()
    made = mgvq.quantize(model, processor, drawn, method="kmeans_ldlq", scope="language", seed=3)
    for name in ("mgvq.safetensors", "mgvq.index"):
        assert (made.save(tmp_path / name) / name).read_bytes() == (run / "checkpoint" / name).read_bytes(), name
    rows = [
        {"image": Image.fromarray(p.pixels), "question": p.questions[0].text, "answer": "2"} for p in draw_test("test", 0, 16)
    ]
    by_rows = mgvq.quantize(model, processor, rows, method="kmeans_ldlq", scope="language", seed=3)
    assert by_rows.ledger.bits() == made.ledger.bits()


FEW = [{"image": Image.new("RGB", (8, 8)), "question": "what ?", "answer": "red"}]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"samples": [{"image": Image.new("RGB", (8, 8)), "question": "what ?"}]}, "row 0.*answer"),
        ({"samples": []}, "samples is empty"),
        ({"method": "full_precision"}, "quantises nothing"),
        ({"method": "magic"}, "magic"),
        ({"settings": {"model.dtype": "float16"}}, r"model\.dtype has no effect here"),
        ({"settings": {"codebook.magic": 1}}, "magic"),
        ({"settings": {"objective": "loss/answer"}}, "objective has no effect here"),
        ({"settings": {"tf32": True}}, "tf32 has no effect here"),
        ({"threads": 0}, "threads must be a whole number >= 1, got 0"),
        ({"threads": True}, "threads must be a whole number >= 1, got True"),
        ({"method": "mgvq", "samples": FEW}, "none is left of samples: give 5 or more"),
    ],
    ids=[
        "row",
        "no rows",
        "method",
        "no method",
        "setting of the model",
        "no setting",
        "objective",
        "tf32",
        "no threads",
        "true",
        "nothing held out",
    ],
)
def test_what_cannot_be_quantised_is_refused_before_any_work(given: dict, reason: str) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(SHIPPED / "tiny_internvl"))
    with pytest.raises(UserError, match=reason):
        mgvq.quantize(model, None, **{"method": "kmeans_ldlq", **given})


def text_model() -> LlamaForCausalLM:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes))


def test_images_for_a_model_of_text_are_refused_before_any_work() -> None:
    with pytest.raises(UserError, match="LlamaForCausalLM reads only text, and samples show it images"):
        mgvq.quantize(text_model(), None, FEW, method="kmeans_ldlq")


def test_a_model_whose_folder_is_gone_is_one_without_a_folder(tmp_path: Path) -> None:
    model = text_model()
    for place, found in ((tmp_path, tmp_path), (tmp_path / "a" / "gone", None)):
        (tmp_path / "config.json").write_text("{}")
        model.name_or_path = str(place)
        assert _folder(model) == found


def test_a_place_that_cannot_be_written_is_told(finished_runs: dict[str, Path]) -> None:
    checkpoint = finished_runs["tiny_internvl"] / "checkpoint"
    made: Any = SimpleNamespace(_files=SimpleNamespace(checkpoint=checkpoint))
    for place in ("/proc/here", "/sys/here"):
        with pytest.raises(UserError, match=f"{place} cannot be written"):
            Quantized.save(made, place)
    with pytest.raises(UserError, match="/proc/here cannot be made"):
        export(checkpoint, Path("/proc/here"), "bf16")


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
