"""The image of a test question, drawn again from its row of a run's samples."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mgvq.data.tiny_vqa.scene import draw_scene, generator, render


def redraw(row: Mapping[str, Any]) -> np.ndarray | None:
    """The RGB image, (64, 64, 3) bytes; None where it is no longer the one that the run saw."""
    split, seed, index, _ = row["sample_id"].split("-")
    pixels = render(draw_scene(generator(int(seed), split, int(index)), split))
    asked = f"{row['question']}\n{row['answer']}".encode()
    digest = hashlib.sha256(pixels.tobytes() + asked).hexdigest()[:16]
    return pixels if digest == row["sample_hash"] else None
