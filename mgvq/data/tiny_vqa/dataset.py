"""Seeded draws of images with questions: by a mix of types (training, calibration) or in a balanced cycle (test)."""

import hashlib
import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from mgvq.data.tiny_vqa.questions import CONTROLS, HEADLINE, TRAINING_MIX, Question, ask
from mgvq.data.tiny_vqa.scene import Scene, draw_scene, generator, render

MOST_QUESTIONS = (
    100_000  # that are drawn at once: images are kept in memory, about 12 kB each, and inputs of a model are made of them
)
# One round of the test: each headline type three times, each control once.
TEST_CYCLE = (*HEADLINE, *HEADLINE, *HEADLINE, *CONTROLS)


@dataclass(frozen=True, slots=True)
class DrawnImage:
    """One image with its questions; `index` is its place in the draw of its split and seed."""

    index: int
    scene: Scene
    pixels: np.ndarray  # uint8, height x width x RGB
    questions: tuple[Question, ...]


def draw_images(
    split: str, seed: int, num_images: int, questions_per_image: int, mix: Mapping[str, float] = TRAINING_MIX
) -> list[DrawnImage]:
    """Images 0 .. num_images - 1 of the split; a longer draw begins with the same images."""
    return [draw_image(split, seed, i, questions_per_image, mix) for i in range(num_images)]


def draw_image(split: str, seed: int, index: int, num_questions: int, mix: Mapping[str, float] = TRAINING_MIX) -> DrawnImage:
    """Image `index` with questions whose types are drawn by weight; no question text comes twice where it can be avoided.

    Raises ValueError where the scene has no question of any type in the mix.
    """
    rng = generator(seed, split, index)
    scene = draw_scene(rng, split)
    types, weights = list(mix), np.fromiter(mix.values(), float)
    cumulative = np.cumsum(weights / weights.sum())
    questions: list[Question] = []
    attempts = 0
    while len(questions) < num_questions:
        attempts += 1
        if attempts > 1000 * num_questions:
            raise ValueError(f"image {index} of {split} has no question of the types {', '.join(types)}")
        kind = types[min(int(np.searchsorted(cumulative, rng.random(), "right")), len(types) - 1)]
        question = ask(scene, kind, rng)
        repeated = question and any(question.text == q.text for q in questions)
        if question and (not repeated or attempts > 20 * num_questions):
            questions.append(question)
    return DrawnImage(index, scene, render(scene), tuple(questions))


def draw_test(split: str, seed: int, num_questions: int, questions_per_image: int = 4) -> list[DrawnImage]:
    """Exactly `num_questions` questions, their types dealt round by round from `TEST_CYCLE`.

    An image answers the first few types in the queue that it can; what it cannot answer waits for the next image, so
    that no type is asked less often for being hard to come by.
    """
    queue = deque(itertools.islice(itertools.cycle(TEST_CYCLE), num_questions))
    return list(_deal(queue, split, seed, questions_per_image))


def _deal(queue: deque[str], split: str, seed: int, questions_per_image: int) -> Iterator[DrawnImage]:
    for index in itertools.count():
        if not queue:
            return
        rng = generator(seed, split, index)
        scene = draw_scene(rng, split)
        questions: list[Question] = []
        waiting: list[str] = []
        while queue and len(questions) < questions_per_image:
            question = ask(scene, kind := queue.popleft(), rng)
            if question and all(question.text != q.text for q in questions):
                questions.append(question)
            else:
                waiting.append(kind)
        queue.extendleft(reversed(waiting))
        if questions:
            yield DrawnImage(index, scene, render(scene), tuple(questions))


def fingerprint(images: list[DrawnImage]) -> str:
    """SHA-256 over every pixel, question and answer: the identity of a draw."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(image.pixels.tobytes())
        for q in image.questions:
            digest.update(f"{q.type}\t{q.text}\t{q.answer}\n".encode())
    return digest.hexdigest()
