"""Models from elsewhere: sizes, the hub's cache, settings of their processors, and code that they bring."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    GotOcr2ImageProcessor,
    LlamaConfig,
    PretrainedConfig,
    Qwen2VLImageProcessor,
)

from mgvq.checkpoint.load import load as load_checkpoint
from mgvq.checkpoint.save import save
from mgvq.errors import UserError
from mgvq.export.folder import export
from mgvq.model.generate import generate
from mgvq.model.load import load
from mgvq.model.processor import adjust, load_processor
from mgvq.model.shape import download_size
from mgvq.model.source import SHIPPED, Source, Stress
from mgvq.runs.build import build
from mgvq.runs.compose import composer
from mgvq.runs.dry import report

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FOLDER = SHIPPED / "tiny_internvl"
LOCAL = Source(name="mine", path=str(FOLDER), revision=None, dtype="float32")
# The sum of the safetensors files in GB, as the hub's file lists give it.
PUBLISHED = {
    "qwen2_vl_7b": 3.9 + 3 * 3.86 + 1.09,
    "internvl3_2b": 4.18,
    "internvl3_8b": 4.88 + 4.99 + 4.93 + 1.09,
    "internvl2_5_2b": 4.41,
    "smolvlm2_2_2b": 4.96 + 4.03,
    "smolvlm2_256m": 1.03,
    "llava_onevision_0_5b": 1.79,
}


def source(model: str) -> Source:
    with composer() as compose:
        return build(compose(f"model={model}"), "model")


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_size_that_is_counted_is_the_one_that_is_published(model: str) -> None:
    assert download_size(source(model)) / 1e9 == pytest.approx(PUBLISHED[model], rel=0.005)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub's in which organisation/model was downloaded at main; the snapshot's folder."""
    repository = tmp_path / "models--organisation--model"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(FOLDER, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return snapshot


def on_hub(revision: str | None) -> Source:
    return replace(LOCAL, path="organisation/model", revision=revision)


def test_a_revision_is_resolved_to_the_commit_that_is_here(hub: Path) -> None:
    moving, pinned = on_hub("main"), on_hub(COMMIT)
    assert moving.identity() == pinned.identity() == f"organisation/model@{COMMIT}"
    assert moving.provenance() == {"path": "organisation/model", "revision": "main", "commit": COMMIT}
    assert (moving.flags(), pinned.flags()) == (["model:moving revision main"], [])
    assert load(moving, CPU).model.config.model_type == "internvl"


@pytest.mark.parametrize("revision", ["v2", COMMIT.replace("0", "9")])
def test_what_is_not_here_is_named_with_the_command_that_gets_it(hub: Path, revision: str) -> None:
    with pytest.raises(UserError, match=f"hf download organisation/model --revision {revision}"):
        on_hub(revision).identity()


def test_a_download_that_was_cut_off_is_not_taken_for_a_model(hub: Path) -> None:
    shards = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    (hub / "model.safetensors").rename(hub / shards["a.weight"])
    (hub / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(UserError, match=r"incomplete .*model-00002-of-00002.safetensors missing"):
        on_hub("main").identity()


def test_settings_of_processor_template_and_attention_reach_the_checkpoint(tmp_path: Path) -> None:
    template = tmp_path / "short.jinja"
    template.write_text("{% for m in messages %}{% for p in m['content'] %}{{ p['text'] or '<image>' }}{% endfor %}{% endfor %}")
    settings = {"size": {"height": 32, "width": 32}, "max_patches": 1}
    own = replace(LOCAL, processor=settings, chat_template=str(template), attention="eager")
    loaded = load(LOCAL, CPU)  # one that works; the settings are put in as `load` does
    assert (own.choices()["processor"], own.choices()["attention"]) == (settings, "eager")
    adjust(loaded.processor, loaded.model.config, own)
    save(tmp_path / "checkpoint", loaded, [], {})
    again = load_processor(str(tmp_path / "checkpoint"))
    picture = Image.new("RGB", (64, 64))
    assert again.image_processor([picture], return_tensors="pt")["pixel_values"].shape[-2:] == (32, 32)
    assert again.chat_template == template.read_text()
    eager = load_checkpoint(tmp_path / "checkpoint", attention="eager").config
    assert (eager._attn_implementation, load_checkpoint(tmp_path / "checkpoint").config._attn_implementation) == ("eager", "sdpa")


@pytest.mark.parametrize("model", ["qwen2_vl_2b", "qwen2_5_vl_3b"])
def test_the_limit_of_pixels_holds(model: str) -> None:
    chosen = source(model)
    processor = SimpleNamespace(image_processor=Qwen2VLImageProcessor())
    adjust(processor, PretrainedConfig(), chosen)
    grid = processor.image_processor([Image.new("RGB", (2000, 1500))], return_tensors="pt")["image_grid_thw"]
    most = chosen.processor["size"]["longest_edge"]
    assert 0.9 * most < int(grid.prod()) * 14**2 <= most


def test_the_limit_of_tiles_holds() -> None:
    processor = SimpleNamespace(image_processor=GotOcr2ImageProcessor(crop_to_patches=True))
    adjust(processor, PretrainedConfig(), replace(source("internvl3_2b"), processor={"max_patches": 4}))
    assert len(processor.image_processor([Image.new("RGB", (900, 900))], return_tensors="pt")["pixel_values"]) == 4 + 1


def test_a_setting_that_the_image_processor_lacks_is_an_error() -> None:
    with pytest.raises(UserError, match=r"model\.processor\.tiles has no effect: GotOcr2ImageProcessor has .*max_patches"):
        load(replace(LOCAL, processor={"tiles": 3}), CPU)


def test_answers_are_greedy_whatever_the_repository_says(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "sampling")
    settings = GenerationConfig.from_pretrained(folder)
    settings.update(do_sample=True, temperature=0.1, top_k=1, repetition_penalty=1.05)
    settings.save_pretrained(folder)
    plain, sampling = (load(replace(LOCAL, path=str(f)), CPU) for f in (FOLDER, folder))
    questions = [(Image.new("RGB", (64, 64), (n, 40, 90)), "list all things :") for n in (0, 128, 255)]
    answers = [generate(m.model, m.processor, questions, 2, {"max_new_tokens": 16}) for m in (plain, sampling)]
    assert answers[0] == answers[1]
    save(tmp_path / "checkpoint", sampling, [], {})  # what the repository says is kept all the same
    kept = load_checkpoint(tmp_path / "checkpoint").generation_config
    assert (kept.do_sample, kept.temperature, kept.top_k, kept.repetition_penalty) == (True, 0.1, 1, 1.05)


def with_code(folder: Path, classes: dict[str, str]) -> Source:
    shutil.copytree(FOLDER, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "not_in_transformers", "auto_map": classes}))
    return replace(LOCAL, path=str(folder), setup="Convert it first.")


def test_code_of_a_repository_is_not_run_unless_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    theirs = with_code(tmp_path / "a", {"AutoConfig": "theirs.Config", "AutoModelForImageTextToText": "theirs.Model"})
    (tmp_path / "a" / "theirs.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(UserError, match=r"theirs\.Config, theirs\.Model.*trust_remote_code=true(.|\n)*Convert it first"):
        load(theirs, CPU)
    assert "may be run" not in caplog.text
    with pytest.raises(SystemExit, match="it was run"):
        load(replace(theirs, trust_remote_code=True), CPU)
    assert re.search(r"Python code of \S+ may be run: theirs\.py \(SHA-256 [0-9a-f]{16}\)", caplog.text)


THEIRS = """
from transformers import InternVLConfig, InternVLForConditionalGeneration

class Config(InternVLConfig):
    model_type = "not_in_transformers"

class Model(InternVLForConditionalGeneration):
    config_class = Config
"""
TERMS = ("LICENSE", "NOTICE.md", "THEIR_TERMS.html")


def test_a_class_of_the_repository_is_loaded_saved_and_loaded_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    theirs = with_code(tmp_path / "a", {"AutoConfig": "theirs.Config", "AutoModelForImageTextToText": "theirs.Model"})
    (tmp_path / "a" / "theirs.py").write_text(THEIRS)
    for name in TERMS:
        (tmp_path / "a" / name).write_text("what may be done with it")
    loaded = load(replace(theirs, trust_remote_code=True), CPU)
    assert type(loaded.model).__name__ == "Model"
    save(tmp_path / "checkpoint", loaded, [], {})
    assert {file.name for file in (tmp_path / "checkpoint").iterdir()} >= {"theirs.py", *TERMS}
    again = load_checkpoint(tmp_path / "checkpoint", trust_remote_code=True)
    assert type(again).__name__ == "Model"
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), loaded.model.parameters(), strict=True))
    plain = export(tmp_path / "checkpoint", tmp_path / "plain", "bf16", trust_remote_code=True).folder
    assert {file.name for file in plain.iterdir()} >= {"theirs.py", *TERMS}
    assert type(AutoModelForImageTextToText.from_pretrained(plain, trust_remote_code=True)).__name__ == "Model"


def test_trusted_code_without_a_class_for_images_and_text_is_an_error(tmp_path: Path) -> None:
    theirs = with_code(tmp_path / "a", {"AutoModel": "theirs.Model"})
    with pytest.raises(UserError, match=r"offers AutoModel, but no AutoModelForImageTextToText\. What to do:\nConvert it first"):
        load(replace(theirs, trust_remote_code=True), CPU)


def test_a_dry_run_counts_and_names_all_that_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    preset = ["experiment=paper_table2", "model=qwen2_vl_72b", "evaluation=tiny_vqa", "~evaluation.tasks"]
    with composer() as compose:
        cfg = compose(*preset)
    assert len(report(cfg)) == 2
    said = capsys.readouterr().out
    for words in (
        "Qwen/Qwen2-VL-72B-Instruct at main", "moving revision main", "146.8 GB on disk", "language 560 layers, 70.2 G weights",
        "calibration.path must be given", "hf download Qwen/Qwen2-VL-72B-Instruct",
    ):  # fmt: skip
        assert words in said


@pytest.mark.parametrize("content", ["{", '{"model_type": "nobody_knows"}'])
def test_a_dry_run_names_a_config_that_cannot_be_read(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(content)
    with composer() as compose:
        cfg = compose("model=local", f"model.path={tmp_path}", "method=kmeans", "evaluation=suite", f"evaluation.data={tmp_path}")
    missing = report(cfg)
    assert any(str(tmp_path) in told and "config.json" in told for told in missing)
    assert any("find no dataset that they can read" in told for told in missing), "the evaluation is looked at too"


def test_a_dry_run_that_lacks_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with composer() as compose:
        cfg = compose("method=kmeans", "model.stress.sigma=0.7")
    assert report(cfg) == []
    assert "nothing is missing" in (said := capsys.readouterr().out)
    assert "stress 0.7" in said


@pytest.mark.parametrize(
    ("model", "counted"),
    [
        ("model=smollm2", ["weights     134.5 M, 269.0 MB on disk", "language 210 layers, 106.2 M weights"]),
        ("model=gemma3_270m", ["weights     268.1 M, 536.2 MB on disk", "language 126 layers"]),
        ("model=local model.path={folder}", ["weights     27.0 k, 108.2 kB on disk", "language 14 layers, 20.5 k weights"]),
    ],
)
def test_a_dry_run_counts_a_text_model(
    model: str, counted: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100).save_pretrained(
        tmp_path
    )
    with composer() as compose:
        words = model.format(folder=tmp_path).split()
        cfg = compose(*words, "method=kmeans", "evaluation=perplexity", f"paths.results={tmp_path / 'results'}")
    report(cfg)
    assert not (tmp_path / "results").exists(), "nothing is unpacked for it"
    said = capsys.readouterr().out
    for words in counted:
        assert words in said


def test_stress_flags_and_identity() -> None:
    stressed = replace(LOCAL, stress=Stress(sigma=0.7, seed=3))
    assert LOCAL.choices() == {}
    assert stressed.choices() == {"stress": {"sigma": 0.7, "seed": 3}}
    assert stressed.flags() == ["model:stress 0.7"]
