"""`mgvq-ask`: a question about an image, to the model that a run has left."""

import io
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
from asked_models import answers, shipped, text_model
from conftest import FAMILIES, ROOT
from PIL import Image
from transformers import AutoProcessor

import mgvq
from mgvq.cli import ask as asking
from mgvq.data.tiny_vqa.dataset import draw_test
from mgvq.errors import UserError
from mgvq.model import ask as single


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
    recorded = {(row.sample_id.rpartition("-")[0], row.question): row.prediction for row in samples.itertuples()}
    places = samples.sample_id.str.rpartition("-")[0].unique()
    asked = [(place, picture.questions[0].text) for place, picture in zip(places, (first, second), strict=False)]
    a, b = (recorded[key] for key in asked)
    images = "\n".join(f"@{place}" for place in (tmp_path / "none.png", 60 * "what is ", tmp_path / "b.png"))  # two are none
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{asked[0][1]}\n{images}\n{asked[1][1]}\n\n"))
    assert said(capsys, monkeypatch, run, tmp_path / "a.png") == [a, b]

    model, processor = shipped(name)
    processor.tokenizer.padding_side = "left"
    (full,) = answers(model, processor, 1)
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
