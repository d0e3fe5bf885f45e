"""The test questions of the tiny VQA as documents, and the scoring of answers to them."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from PIL import Image

from mgvq.data.tiny_vqa.dataset import DrawnImage, draw_test
from mgvq.data.tiny_vqa.questions import HEADLINE


def documents(seed: int, num_questions: int) -> list[dict[str, Any]]:
    """One document a question: `sample_id, sample_hash, type, question, answer, image`."""
    return [doc for drawn in draw_test("test", seed, num_questions) for doc in _documents(drawn, seed)]


def _documents(drawn: DrawnImage, seed: int) -> list[dict[str, Any]]:
    image = Image.fromarray(drawn.pixels)
    pixels = drawn.pixels.tobytes()
    return [
        {
            "sample_id": f"test-{seed}-{drawn.index}-{number}",
            "sample_hash": hashlib.sha256(pixels + f"{q.text}\n{q.answer}".encode()).hexdigest()[:16],
            "type": q.type,
            "question": q.text,
            "answer": q.answer,
            "image": image,
        }
        for number, q in enumerate(drawn.questions)
    ]


def is_right(doc: dict[str, Any], answer: str) -> bool:
    """Exact match of the whole answer."""
    return answer.split() == doc["answer"].split()


def headline_accuracy(items: Sequence[dict[str, Any]]) -> float:
    """Weighted mean over the headline types of the share of right answers; types that were not asked are left out."""
    scores: dict[str, list[float]] = defaultdict(list)
    for item in items:
        scores[item["type"]].append(item["score"])
    asked = {kind: weight for kind, weight in HEADLINE.items() if kind in scores}
    total = sum(asked.values())
    return sum(w * sum(scores[k]) / len(scores[k]) for k, w in asked.items()) / total if total else float("nan")
