"""A few rows of each public benchmark in the columns of its hub dataset, about the project's own pictures."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # as mgvq/evaluation/harness.py does, before the library is imported

import yaml
from datasets import Dataset, Features, List, Value
from datasets import Image as Picture
from PIL import Image

from mgvq.data.benchmarks import BENCHMARKS
from mgvq.data.tiny_vqa.dataset import draw_test

ROWS = 6
TEXT, NUMBER = Value("string"), Value("int64")
RIGHT = "BADCBA"  # of the questions with options


@functools.cache
def pictures() -> list[Image.Image]:
    return [Image.fromarray(p.pixels) for p in draw_test("test", 7, 4 * ROWS)[:ROWS]]


def mmmu(image: Image.Image, n: int) -> dict[str, Any]:
    """The third is open, the fourth shows two pictures."""
    is_open, two = n == 2, n == 3
    return {
        "id": f"validation_{('Art', 'Math')[n % 2]}_{n}",
        "question": f"Which colour has the thing in <image 1>{' and <image 2>' * two}?",
        "options": "[]" if is_open else "['red', 'blue', 'green', 'some other colour']",
        "explanation": "",
        **{f"image_{k}": image if k == 1 or (two and k == 2) else None for k in range(1, 8)},
        "img_type": "['Drawings']",
        "answer": "three" if is_open else RIGHT[n],
        "topic_difficulty": "Easy",
        "question_type": "open" if is_open else "multiple-choice",
        "subfield": "Drawing",
    }


def seedbench(image: Image.Image, n: int) -> dict[str, Any]:
    """The last is about a video."""
    video = n == ROWS - 1
    return {
        "answer": RIGHT[n],
        **{f"choice_{letter}": f"{number} things" for letter, number in zip("abcd", (1, 2, 3, 4), strict=True)},
        "data_id": str(n),
        "data_type": "video" if video else "image",
        "question": "How many things are there?",
        "question_id": str(n),
        "question_type_id": 1 + n % 2,
        "image": [image] * (8 if video else 1),
        "segment": [0, 8] if video else None,
    }


def ocrbench(image: Image.Image, n: int) -> dict[str, Any]:
    return {
        "dataset": "HME100k" if n == 0 else "IIIT5K",
        "question": "what is written in the image?",
        "question_type": "Digit String Recognition" if n % 2 else "Regular Text Recognition",
        "answer": [f"word{n}", f"words {n}"],
        "image": image,
    }


def vizwiz(image: Image.Image, n: int) -> dict[str, Any]:
    answers = ["unanswerable"] * 10 if n == 0 else ["red"] * 4 + ["blue"] * 2 + ["green", "grey", "gray", "pink"]
    return {
        "question_id": f"VizWiz_val_{n}",
        "image": image,
        "question": "what colour is this?",
        "answers": answers,
        "category": "unanswerable" if n == 0 else "other",
    }


def scienceqa(image: Image.Image, n: int) -> dict[str, Any]:
    """Two options in every other row."""
    answer = "ABCD".index(RIGHT[n])
    return {
        "image": image,
        "question": "Which of these is drawn?",
        "choices": ["a circle", "a ring"] if n in (0, 1, 4) else ["a circle", "a ring", "a cross", "a star"],
        "answer": answer,
        "hint": "Look at the picture." if n % 2 else "",
        "task": "closed choice",
        "grade": "grade2",
        "subject": "natural science" if n % 2 else "language science",
        "topic": "shapes",
        "category": "shapes",
        "skill": "Identify shapes",
        "lecture": "",
        "solution": "",
    }


def textvqa(image: Image.Image, n: int) -> dict[str, Any]:
    return {
        "image_id": f"{n:016x}",
        "question_id": 34602 + n,
        "question": "what number is this?",
        "question_tokens": ["what", "number", "is", "this"],
        "image": image,
        "image_width": image.width,
        "image_height": image.height,
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "answers": ["7"] * 8 + ["seven", "one"],
        "image_classes": ["Drawing"],
        "set_name": "val",
        "ocr_tokens": ["7"],
        "ocr_info": [],
    }


def mmbench(image: Image.Image, n: int) -> dict[str, Any]:
    """Three questions of two rows: the second has the options the other way round. The last question has two options."""
    question, turned = divmod(n, 2)
    words = ["circle", "ring"] if question == 2 else ["circle", "ring", "cross", "star"]
    order = words[::-1] if turned else words
    return {
        "index": question + turned * 1_000_000,
        "question": "What is in the picture?",
        "hint": "nan",
        "answer": "ABCD"[order.index(words[question % len(words)])],
        **{letter: word for letter, word in zip("ABCD", [*order, "nan", "nan"], strict=False)},
        "category": ("object_localization", "attribute_recognition")[question % 2],
        "image": pictures()[question],
        "source": "drawn",
        "L2-category": "finegrained_perception (instance-level)",
        "comment": "nan",
        "split": "dev",
    }


def mmstar(image: Image.Image, n: int) -> dict[str, Any]:
    category, finer = (("math", "geometry"), ("coarse perception", "image emotion"), ("math", "statistical reasoning"))[n % 3]
    return {
        "index": n,
        "question": "Which is it?\nOptions: A: one, B: two, C: three, D: four",
        "image": image,
        "answer": RIGHT[n],
        "category": category,
        "l2_category": finer,
        "meta_info": {"source": "drawn", "split": "val", "image_path": f"images/{n}.jpg"},
    }


MAKERS: dict[str, Callable[[Image.Image, int], dict[str, Any]]] = {
    "mmmu_val": mmmu, "seedbench": seedbench, "ocrbench": ocrbench, "vizwiz_vqa_val": vizwiz, "scienceqa_img": scienceqa,
    "textvqa_val": textvqa, "mmbench_en_dev_static": mmbench, "mmstar": mmstar,
}  # fmt: skip


def rows(task: str) -> list[dict[str, Any]]:
    return [MAKERS[task](image, n) for n, image in enumerate(pictures())]


def _features(row: dict[str, Any]) -> Features:
    def of(key: str, value: Any) -> Any:
        if isinstance(value, Image.Image) or (key.startswith("image_") and value is None):
            return Picture()
        if isinstance(value, list):
            return List(of(key, value[0]) if value else TEXT)
        if isinstance(value, dict):
            return {k: of(k, v) for k, v in value.items()}
        if key == "segment":
            return List(NUMBER)
        if key == "category" and value in ("unanswerable", "other"):
            return TEXT
        return NUMBER if isinstance(value, int) else TEXT

    return Features({key: of(key, value) for key, value in row.items()})


def write(folder: Path) -> Path:
    """Copies of all the datasets, as `hf download --local-dir folder/ORGANISATION/NAME` leaves them."""
    for task, benchmark in BENCHMARKS.items():
        made = rows(task)
        place = folder / benchmark.dataset
        (place / "data").mkdir(parents=True)
        file = f"data/{benchmark.split}-00000-of-00001.parquet"
        Dataset.from_list(made, features=_features(made[0])).to_parquet(place / file)
        files = {"config_name": benchmark.part or "default", "data_files": [{"split": benchmark.split, "path": file}]}
        (place / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': [files]})}---\n")
    return folder
