"""`mgvq.quantize`: a model that is loaded already, quantised in Python."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from asked_models import answers, shipped, text_model
from conftest import run_command
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

import mgvq
from mgvq.data.tiny_vqa.dataset import draw_test
from mgvq.errors import UserError
from mgvq.export.folder import export
from mgvq.model.source import SHIPPED
from mgvq.runs.api import Quantized, _folder


def test_quantised_in_python_it_has_the_bytes_of_the_run(finished_runs: dict[str, Path], tmp_path: Path) -> None:
    run = finished_runs["tiny_internvl"] / "checkpoint"
    model, processor = shipped()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = mgvq.quantize(model, processor, method="kmeans", bits=2.0, seed=0)
    saved = made.save(tmp_path / "checkpoint")
    for name in ("mgvq.safetensors", "mgvq.index", "generation_config.json", "tokenizer.json", "processor_config.json"):
        assert (saved / name).read_bytes() == (run / name).read_bytes(), name
    assert made.ledger.bits() == {key: json.loads((run.parent / "metrics.json").read_text())[key] for key in made.ledger.bits()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert answers(made.model, made.processor) == answers(mgvq.load(run), made.processor)
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
    model, processor = shipped()
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


def test_a_checkpoint_is_written_whole_or_not_at_all(
    finished_runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Any = SimpleNamespace(_files=SimpleNamespace(checkpoint=finished_runs["tiny_internvl"] / "checkpoint"))
    copied, copy = list[Path](), shutil.copyfile

    def full(source: Path, target: Path) -> Path:
        if copied:
            raise OSError(errno.ENOSPC, "No space left on device")
        copied.append(copy(source, target))
        return target

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match="model cannot be written"):
        Quantized.save(made, tmp_path / "new" / "model")
    assert copied
    assert not list((tmp_path / "new").iterdir())
    monkeypatch.undo()
    assert (Quantized.save(made, tmp_path / "new" / "model") / "config.json").is_file()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["model"]
