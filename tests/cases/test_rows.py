"""Rows and images that people have, by kind. A new one is a line: what stands in the file, and what is read or said."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import copy, edit_json, run, source
from PIL import Image, ImageFile

from mgvq.calibration.chat import ChatLines
from mgvq.calibration.hub import Hub
from mgvq.calibration.image_text import ImageText
from mgvq.calibration.images import read_image
from mgvq.calibration.rows import json_lines
from mgvq.calibration.sharegpt4v import ShareGPT4V
from mgvq.calibration.tiny_vqa import TinyVQA as DrawnVQA
from mgvq.checks import whole_number
from mgvq.errors import UserError
from mgvq.evaluation.perplexity import Perplexity
from mgvq.evaluation.suite import Suite
from mgvq.evaluation.tiny_vqa import TinyVQA
from mgvq.model.chat import Chat, Turn
from mgvq.model.encode import Example
from mgvq.model.fit import check_samples
from mgvq.model.load import describe
from mgvq.model.text import Passage
from mgvq.runs.digests import data_digest

DRAW = {"num_samples": 1, "heldout_samples": 0, "batch_size": 4, "seed": 0, "label_seed": 0}
GREEN = (10, 200, 30)


def rows_of(folder: Path, content: bytes) -> ImageText:
    Image.new("RGB", (8, 8), GREEN).save(folder / "a.png")
    (folder / "rows.jsonl").write_bytes(content)
    return ImageText(path=str(folder / "rows.jsonl"), **DRAW)


def row(question: str = "q", answer: str = "a", image: str = "a.png") -> bytes:
    return json.dumps({"image": image, "question": question, "answer": answer}, ensure_ascii=False).encode()


# Lines and characters

QUESTIONS = ["before\u2028behind", "before\u2029behind", "before\x85behind", "before\x0cbehind", "umläut", "漢字", "🙂", "a\\b"]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_line_ends_at_a_newline_alone(question: str, end: bytes, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, end.join([b"", row(question), b"  ", row("other")]) + end)
    first, other = json_lines(rows.path)
    assert (first.where, other.where) == ("line 2", "line 4")
    assert first.content()["question"] == question
    assert rows.turns(first)[0].text == question
    before = data_digest(rows.path)  # the identity reads the same rows
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert data_digest(rows.path) != before


def test_an_image_that_is_no_file_hides_no_other_from_the_identity(tmp_path: Path) -> None:
    """A data URL is longer than a path may be."""
    images = ["data:image/png;base64," + 5000 * "A", "gone.png", "a.png"]
    rows = rows_of(tmp_path, json.dumps({"images": images, "question": "q", "answer": "a"}).encode())
    before = data_digest(rows.path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert data_digest(rows.path) != before


def test_images_of_lines_count_whatever_the_file_is_called(tmp_path: Path) -> None:
    """Of a file .json too, which for other calibrations is one list and names none."""
    row = json.dumps({"image": "a.png", "question": "q", "answer": "a"})
    for name, content in (("rows.json", row), ("list.json", f"\ufeff[{row}]")):
        (tmp_path / name).write_text(content, encoding="utf-8")
    before = {name: data_digest(str(tmp_path / name)) for name in ("rows.json", "list.json")}
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert data_digest(str(tmp_path / "rows.json")) != before["rows.json"]
    assert data_digest(str(tmp_path / "list.json")) == before["list.json"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_part_of_a_row(mark: bytes, tmp_path: Path) -> None:
    assert rows_of(tmp_path, mark + row("q")).draw().examples


def test_rows_are_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, row("umläut"))
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    code = f"from mgvq.calibration.rows import json_lines; print(ascii(json_lines({rows.path!r})[0].content()['question']))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **plain}, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (ascii("umläut"), "")


BAD_ROWS: dict[str, tuple[bytes, str]] = {
    "another encoding": ("umläut".encode("utf-16"), r"rows\.jsonl is not a text file in UTF-8"),
    "latin 1": (row("x").replace(b"x", b"\xe4"), r"rows\.jsonl is not a text file in UTF-8"),
    "no json": (b"{'image': 1}", r"rows\.jsonl, line 1: cannot be read"),
    "brackets without end": (b"[" * 100_000, r"rows\.jsonl, line 1: cannot be read \(RecursionError"),
    "a JSON list": (b"[" + row() + b",\n" + row() + b"]", r"rows\.jsonl, line 1: it is one JSON list, and rows are lines"),
    "a pretty JSON list": (b"\n[\n  " + row() + b"\n]", r"rows\.jsonl, line 2: it is one JSON list"),
    "a key twice": (
        b'{"image": "a.png", "question": "q", "question": "r", "answer": "a"}',
        r"line 1: .*'question' stands in it twice",
    ),
    "zero bytes": (b"\0", r"rows\.jsonl, line 1: cannot be read"),
    "a number of 5,000 digits": (
        b'{"image": "a.png", "question": "q", "answer": ' + b"9" * 5000 + b"}",
        r"line 1: cannot be read",
    ),
    "numbers that are none": (b'{"image": "a.png", "question": NaN, "answer": Infinity}', r"line 1: question and answer must be"),
    "an address": (row(image="https://example.org/a.png"), r"line 1: .* there is no such file"),
    "a list": (b"[1]", r"line 1: must be an object"),
    "half a surrogate pair": (b'{"image": "a.png", "question": "\\ud83d", "answer": "a"}', r"line 1: holds half of a surrogate"),
    "no image of that name": (row(image="b.png"), r"line 1: .*b\.png cannot be read as an image: there is no such file"),
    "a folder as image": (row(image="."), r"line 1: .* cannot be read as an image: there is no such file"),
    "a name of zeros": (b'{"image": "a\\u0000.png", "question": "q", "answer": "a"}', r"line 1: .*(cannot be|no such file)"),
    "a name without end": (row(image="x" * 5000), r"line 1: .*(cannot be|no such file)"),
    "a number as image": (b'{"image": 7, "question": "q", "answer": "a"}', r"line 1: an image must be a file name"),
    "a number as question": (b'{"image": "a.png", "question": 7, "answer": "a"}', r"line 1: question and answer must be texts"),
    "no answer": (b'{"image": "a.png", "question": "q", "answer": " "}', r"line 1: no answer tokens"),
    "empty": (b"", r"has 0 rows"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_refused_with_file_and_line(case: str, tmp_path: Path) -> None:
    content, named = BAD_ROWS[case]
    with pytest.raises(UserError, match=named):
        rows_of(tmp_path, content).draw()


def test_captions_with_brackets_without_end_are_named(tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text("[\n" + "[" * 100_000)
    with pytest.raises(UserError, match=r"captions\.json, line 2: brackets within brackets"):
        ShareGPT4V(path=str(tmp_path / "captions.json"), images=str(tmp_path), prefix="coco/", **DRAW).draw()


# Images: what Pillow raises


def png_chunk(kind: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack(">I", len(data) if length is None else length) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int) -> bytes:
    """A black PNG of side x side pixels in a few kilobytes."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    lines = zlib.compress(bytes((side + 7) // 8 + 1) * side, 9)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", lines) + png_chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **settings: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
WHOLE_JPEG, WHOLE_PNG = saved(NOISE, "JPEG"), saved(NOISE, "PNG")
BAD_IMAGES: dict[str, bytes] = {
    "empty": b"",
    "text": b"this is no image",
    "jpeg cut off": WHOLE_JPEG[: len(WHOLE_JPEG) // 2],
    "png cut off": WHOLE_PNG[: len(WHOLE_PNG) // 2],
    "png with a wrong chunk length": WHOLE_PNG[:33] + struct.pack(">I", 200) + WHOLE_PNG[37:],
    "png with a wrong header length": WHOLE_PNG[:8] + struct.pack(">I", 3) + WHOLE_PNG[12:],
    "png with a wrong check sum": WHOLE_PNG[:29] + b"\0\0\0\0" + WHOLE_PNG[33:],
    "png of broken lines": WHOLE_PNG[:60] + bytes(200) + WHOLE_PNG[260:],
    "20,000 x 20,000 in 49 kB": bomb(20_000),
    "14,000 x 14,000": bomb(14_000),
    "floating-point values": saved(Image.new("F", (4, 4), 0.5), "TIFF"),
    "32-bit values": saved(Image.new("I", (4, 4), 70_000), "TIFF"),
    "gif cut off": saved(NOISE.convert("P"), "GIF")[:500],
    "bmp cut off": saved(NOISE, "BMP")[:500],
    "webp cut off": saved(NOISE, "WEBP")[:100],
    "tiff cut off": saved(NOISE, "TIFF")[:100],
}


@pytest.mark.parametrize("case", BAD_IMAGES)
@pytest.mark.parametrize("lenient", [False, True], ids=["by itself", "after a library that wants to see cut images"])
def test_an_image_that_cannot_be_read_is_refused_with_file_and_line(
    case: str, lenient: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None if lenient else Image.MAX_IMAGE_PIXELS)
    rows = rows_of(tmp_path, b"\n" + row(image="b.png"))
    (tmp_path / "b.png").write_bytes(BAD_IMAGES[case])
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: .*b\.png cannot be read as an image \("):
        rows.draw()
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


# Images: what a person sees


def with_orientation(number: int) -> bytes:
    image = Image.new("RGB", (8, 4), (0, 0, 0))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = number
    return saved(image, "PNG", exif=exif)


def palette_with_hole() -> bytes:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 255, *GREEN] + [0] * 762)
    image.putpixel((1, 1), 1)
    return saved(image, "PNG", transparency=0)


GREY_16 = np.array([[0, 257 * 5], [257 * 100 + 128, 65535]], np.uint16)
SEEN: dict[str, tuple[bytes, dict[tuple[int, int], tuple[int, int, int]]]] = {
    "16-bit grey": (
        saved(Image.fromarray(GREY_16), "PNG"),
        {(0, 0): (0, 0, 0), (1, 0): (5, 5, 5), (0, 1): (100, 100, 100), (1, 1): (255, 255, 255)},
    ),
    "16-bit grey TIFF": (saved(Image.fromarray(GREY_16), "TIFF"), {(1, 0): (5, 5, 5), (1, 1): (255, 255, 255)}),
    "8-bit grey": (saved(Image.new("L", (2, 2), 77), "PNG"), {(0, 0): (77, 77, 77)}),
    "black and white": (saved(Image.new("1", (2, 2), 1), "PNG"), {(0, 0): (255, 255, 255)}),
    "clear": (saved(Image.new("RGBA", (2, 2), (9, 9, 9, 0)), "PNG"), {(0, 0): (255, 255, 255)}),
    "half clear": (saved(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "PNG"), {(0, 0): (127, 127, 127)}),
    "clear grey": (saved(Image.new("LA", (2, 2), (9, 0)), "PNG"), {(0, 0): (255, 255, 255)}),
    "a hole in a palette": (palette_with_hole(), {(0, 0): (255, 255, 255), (1, 1): GREEN}),
    "a clear colour": (saved(Image.new("RGB", (2, 2), GREEN), "PNG", transparency=GREEN), {(0, 0): (255, 255, 255)}),
    "CMYK": (saved(Image.new("CMYK", (2, 2), (0, 0, 0, 0)), "TIFF"), {(0, 0): (255, 255, 255)}),
    "upright": (with_orientation(1), {(0, 0): (255, 255, 255)}),
    "turned by 90 degrees": (with_orientation(6), {(3, 0): (255, 255, 255)}),
    "turned by 180 degrees": (with_orientation(3), {(7, 3): (255, 255, 255)}),
    "turned by 270 degrees": (with_orientation(8), {(0, 7): (255, 255, 255)}),
    "mirrored": (with_orientation(2), {(7, 0): (255, 255, 255)}),
    "an orientation that there is not": (with_orientation(77), {(0, 0): (255, 255, 255)}),
    "one pixel": (saved(Image.new("RGB", (1, 1), GREEN), "PNG"), {(0, 0): GREEN}),
}


@pytest.mark.parametrize("case", SEEN)
def test_an_image_is_what_a_person_sees(case: str) -> None:
    content, pixels = SEEN[case]
    with Image.open(io.BytesIO(content)) as opened:
        for seen in (read_image(content), read_image(opened)):
            assert seen.mode == "RGB"
            assert {place: seen.getpixel(place) for place in pixels} == pixels


def test_rows_of_a_saved_data_set_have_the_same_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    images = [SEEN["16-bit grey"][0], SEEN["turned by 90 degrees"][0], BAD_IMAGES["jpeg cut off"]]
    columns = {"image": [{"bytes": b, "path": None} for b in images], "answer": ["a", "b", "c"]}
    features = datasets.Features({"image": datasets.Image(), "answer": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "data")
    chosen = {"images": "image", "answer": "answer", "question": None, "messages": None}
    data = Hub(path=str(tmp_path / "data"), subset=None, split=None, revision=None, columns=chosen, **DRAW)
    grey, turned, bad = data.rows()
    assert data.turns(grey)[0].parts[0].getpixel((1, 0)) == (5, 5, 5)  # type: ignore[union-attr]
    assert data.turns(turned)[0].parts[0].size == (4, 8)  # type: ignore[union-attr]
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UserError, match=r"data, split None, row 2: cannot be read"):
        data.turns(bad)


# Samples that a model cannot take, before its weights are read


def image(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), GREEN)


def chat(*parts: Any) -> Chat:
    return Chat("rows.jsonl, line 7", (Turn("user", parts), Turn("assistant", ("a",))))


TOO_LONG = "word " * 400
REFUSED: dict[str, tuple[str, Any, str]] = {
    "a narrow image": (
        "tiny_qwen2_vl",
        chat(image(900, 3), "q"),
        r"Qwen2VLProcessor refuses its images of 900 x 3 pixels.*ratio",
    ),
    "the second of two": ("tiny_qwen2_vl", chat(image(64, 64), image(3, 900), "q"), r"refuses its images of 64 x 64, 3 x 900"),
    "a long text": ("tiny_internvl", chat(image(64, 64), TOO_LONG), r"has \d+ tokens, and the model was made for 512 positions"),
    "a long text alone": ("tiny_internvl", chat(TOO_LONG), r"has \d+ tokens, .* 512 positions"),
    "many images": ("tiny_internvl", chat(*[image(64, 64)] * 40, "q"), r"has \d{3} tokens, .* 512 positions"),
    "an image token in a text": (
        "tiny_internvl",
        chat(image(64, 64), "is <image> one ?"),
        "'<image>' in a text is a special token",
    ),
    "an end token in a text": ("tiny_internvl", chat("q <|im_end|> r"), r"'<\|im_end\|>' in a text is a special token"),
    "a question": (
        "tiny_smolvlm",
        Example("rows.jsonl, line 7", image(64, 64), "is <image> one ?", "a"),
        "'<image>' in a text is a special token",
    ),
    "an answer": (
        "tiny_internvl",
        Example("rows.jsonl, line 7", image(64, 64), "q", "a<|im_end|>b"),
        r"'<\|im_end\|>' in a text is a special token",
    ),
    "a passage": ("tiny_internvl", Passage("rows.jsonl, line 7", TOO_LONG), r"has \d+ tokens, .* 512 positions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_sample_that_the_model_cannot_take_is_named(case: str, tmp_path: Path) -> None:
    family, sample, named = REFUSED[case]
    described = describe(source(copy(tmp_path / "m", family)))
    check_samples(described, [chat(image(64, 64), "q"), chat("q")])
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 7: .*{named}"):
        check_samples(described, [chat(image(64, 64), "q"), sample])


def test_a_run_refuses_its_rows_before_it_reads_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgvq.runs.execute.load", lambda *_: pytest.fail("the weights were read"))
    rows = rows_of(tmp_path, row("is <|image_pad|> one ?"))
    settings = ["method=gptq", "calibration=image_text", f"calibration.path={rows.path}", "calibration.num_samples=1"]
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1: '<\|image_pad\|>' in a text"):
        run(tmp_path, "tiny_qwen2_vl", *settings, "calibration.heldout_samples=0")


def test_a_template_that_refuses_a_row_is_named_before_the_weights_are_read(tmp_path: Path) -> None:
    folder = copy(tmp_path / "m")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}<|user|>{% endfor %}"
    )
    described = describe(source(folder))
    sample = Chat("rows.jsonl, line 7", (Turn("system", ("s",)), Turn("user", ("q",)), Turn("assistant", ("a",))))
    with pytest.raises(UserError, match=r"rows\.jsonl, line 7: the chat template of InternVLProcessor refuses it"):
        check_samples(described, [sample])


# Numbers that are none, or far too large

SUITE = {"tasks": ["mmstar"], "max_new_tokens": {"mmstar": 16}, "limit": 3, "seed": 0, "batch_size": 8, "data": None}
VQA = {"num_questions": 8, "seed": 0, "answers": "forced"}
DRAWN = {"num_images": 2, "questions_per_image": 4, "heldout_images": 1, "shown": "both", "seed": 0, "label_seed": 0}
PROSE = {"num_passages": 3, "seed": 0}
TEXTS = {"path": "rows.jsonl", **DRAW}
NUMBERS: list[tuple[Callable[..., Any], dict[str, Any], str, Any, str]] = [
    (TinyVQA, VQA, "num_questions", 999_999_999, r"evaluation\.num_questions must be a whole number from 1 to 100000"),
    (TinyVQA, VQA, "num_questions", True, r"evaluation\.num_questions .* got True"),
    (TinyVQA, VQA, "seed", -1, r"evaluation\.seed must be a whole number >= 0"),
    (Perplexity, PROSE, "num_passages", 999_999_999, r"evaluation\.num_passages=999999999, but there are"),
    (Perplexity, PROSE, "num_passages", False, r"evaluation\.num_passages .* got False"),
    (Suite, SUITE, "limit", 0, r"evaluation\.limit .* got 0\. null asks all"),
    (DrawnVQA, DRAWN, "num_images", 999_999_999, r"calibration\.num_images must be a whole number from 1 to"),
    (DrawnVQA, DRAWN, "questions_per_image", 90_000, r"calibration asks 270,000 questions"),
    (ChatLines, TEXTS, "batch_size", True, r"calibration\.batch_size .* got True"),
]


@pytest.mark.parametrize(("variant", "settings", "name", "value", "named"), NUMBERS)
def test_a_number_out_of_range_is_refused(variant: Any, settings: dict[str, Any], name: str, value: Any, named: str) -> None:
    variant(**settings)
    with pytest.raises(UserError, match=named):
        variant(**{**settings, name: value})


@pytest.mark.parametrize("value", [None, True, 2.5, "8", [1], -1, 11, float("nan")])
def test_what_is_no_whole_number_in_range_is_named(value: Any) -> None:
    for good in (0, 10):
        whole_number("evaluation.seed", good, most=10)
    with pytest.raises(UserError, match=rf"evaluation\.seed must be a whole number from 0 to 10, got {re.escape(repr(value))}\."):
        whole_number("evaluation.seed", value, most=10)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    (tmp_path / "file").write_text("no folder")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text('{"q": "q", "a": "a"}\n')
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file" / "datasets"))
    chosen = {"question": "q", "answer": "a"}
    hub = Hub(path=str(tmp_path / "data"), subset=None, split="train", revision=None, columns=chosen, **DRAW)
    with pytest.raises(UserError, match=r"file/datasets, which must be writable: HF_HOME says where"):
        hub.rows()


def test_positions_may_be_unlimited(tmp_path: Path) -> None:
    folder = copy(tmp_path / "m")
    edit_json(folder / "config.json", lambda c: c["text_config"].update(max_position_embeddings=4096))
    check_samples(describe(source(folder)), [chat(TOO_LONG)])
