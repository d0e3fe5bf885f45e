"""Scenes of the tiny VQA: what lies where (`Scene`), and the image of it (`render`).

An image is 64 x 64 RGB, a 4 x 4 grid of 16-pixel cells with three to eight things, each a drawn shape or a real handwritten
digit (scikit-learn's `load_digits`), on a textured and noisy background. The layouts and the handwriting of the four splits are
disjoint by construction: a layout belongs to the split that its checksum names, a written digit to the split its index lies in.
"""

import functools
import gzip
import zlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

GRID, CELL = 4, 16
SIDE = GRID * CELL
COLORS = {
    "red": (222, 44, 44), "green": (44, 170, 64), "blue": (52, 84, 224), "yellow": (232, 214, 56),
    "purple": (152, 62, 192), "orange": (242, 142, 40), "cyan": (64, 204, 214), "white": (240, 240, 240),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "ring", "cross", "diamond", "bar")
DIGIT = "digit"
KINDS = (*SHAPES, DIGIT)
SIZES = {"small": 4.2, "big": 7.0}  # half the width in pixels
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MIN_THINGS, MAX_THINGS = 3, 8

# Split -> (residues of the layout checksum modulo 8, indices of the written digits).
SPLITS = {
    "train": (frozenset({0, 1, 2, 3, 4}), range(0, 1197)),
    "calibration": (frozenset({5}), range(1197, 1397)),
    "validation": (frozenset({6}), range(1397, 1597)),
    "test": (frozenset({7}), range(1597, 1797)),
}


@dataclass(frozen=True, slots=True)
class Thing:
    """One thing in one cell. `digit` is the written number, None for a shape; a digit has no size word."""

    cell: int
    color: str
    kind: str
    size: str
    digit: int | None
    writing: int  # index of the handwriting in load_digits, -1 for a shape

    @property
    def row(self) -> int:
        return self.cell // GRID

    @property
    def column(self) -> int:
        return self.cell % GRID

    @property
    def name(self) -> str:
        """The word a list calls it by: its shape, or the number that is written."""
        return self.kind if self.digit is None else NUMBERS[self.digit]


@dataclass(frozen=True, slots=True)
class Scene:
    """Things in raster order, and the seed of everything in the image that no question asks about."""

    things: tuple[Thing, ...]
    texture_seed: int


def generator(seed: int, split: str, index: int) -> np.random.Generator:
    """The random stream of image `index`: images can be drawn in any order, in any process."""
    return np.random.default_rng([seed, zlib.crc32(split.encode()), index])


def draw_scene(rng: np.random.Generator, split: str) -> Scene:
    """Draw layouts until one belongs to `split` (eight tries on average for the small splits)."""
    residues, writings = SPLITS[split]
    while True:
        things = _draw_things(rng, writings)
        layout = repr([(t.cell, t.color, t.kind, t.size, t.digit) for t in things])
        if zlib.crc32(layout.encode()) % 8 in residues:
            return Scene(things, int(rng.integers(2**31)))


def _draw_things(rng: np.random.Generator, writings: range) -> tuple[Thing, ...]:
    _, labels = _written_digits()
    num_things = int(rng.integers(MIN_THINGS, MAX_THINGS + 1))
    cells = np.sort(rng.permutation(GRID * GRID)[:num_things])
    kinds, colors = list(KINDS), list(COLORS)
    if rng.random() < 0.5:  # few kinds and colours: there is something to count
        kinds = [kinds[i] for i in rng.permutation(len(kinds))[: rng.integers(2, 5)]]
        colors = [colors[i] for i in rng.permutation(len(colors))[: rng.integers(2, 5)]]
    things = []
    for cell in cells:
        kind, color = kinds[rng.integers(len(kinds))], colors[rng.integers(len(colors))]
        if kind == DIGIT:
            writing = int(rng.integers(writings.start, writings.stop))
            things.append(Thing(int(cell), color, kind, "big", int(labels[writing]), writing))
        else:
            size = ("small", "big")[rng.integers(2)]
            things.append(Thing(int(cell), color, kind, size, None, -1))
    return tuple(things)


def render(scene: Scene) -> np.ndarray:
    """The image: uint8, height x width x RGB, the same bytes on every call."""
    rng = np.random.default_rng(scene.texture_seed)
    image = _background(rng)
    for thing in scene.things:
        mask = _digit_mask(rng, thing.writing) if thing.kind == DIGIT else _shape_mask(thing.kind, thing.size)
        slack = 1 if thing.size == "big" else 3
        shift = rng.integers(-slack, slack + 1, 2)
        alpha = np.zeros((CELL, CELL), np.float32)
        y, x = np.maximum(shift, 0)
        v, u = np.maximum(-shift, 0)
        alpha[y : CELL - v, x : CELL - u] = mask[v : CELL - y, u : CELL - x]
        color = np.asarray(COLORS[thing.color], np.float32) * rng.uniform(0.8, 1.05) + rng.uniform(-12, 12, 3)
        top, left = thing.row * CELL, thing.column * CELL
        patch = image[top : top + CELL, left : left + CELL]
        patch += alpha[..., None] * (color.astype(np.float32) - patch)
    image += rng.uniform(3, 10) * rng.standard_normal(image.shape, np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def _background(rng: np.random.Generator) -> np.ndarray:
    start, end = rng.uniform(20, 110, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    y, x = _grid()
    ramp = ((np.cos(angle) * x + np.sin(angle) * y) / SIDE + 1) / 2
    image = start + np.clip(ramp, 0, 1)[..., None] * (end - start)
    strength, period, texture = rng.uniform(5, 18), int(rng.integers(3, 9)), int(rng.integers(4))
    if texture == 1:  # stripes
        image += (strength * (((x + y * rng.integers(-1, 2)) // period) % 2))[..., None]
    elif texture == 2:  # checker
        image += (strength * ((x // period + y // period) % 2))[..., None]
    elif texture == 3:  # blocks
        image += strength * np.kron(rng.uniform(-1, 1, (8, 8, 3)), np.ones((8, 8, 1)))
    return image.astype(np.float32)


@functools.cache
def _grid() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:SIDE, :SIDE]
    return y, x


@functools.cache
def _shape_mask(kind: str, size: str) -> np.ndarray:
    """Coverage of each pixel of the cell in [0, 1], anti-aliased by 8 x 8 samples a pixel."""
    samples = 8
    axis = (np.arange(CELL * samples) + 0.5) / samples - CELL / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    r = SIZES[size]
    radius = np.hypot(x, y)
    inside = {
        "circle": radius < r,
        "square": np.maximum(abs(x), abs(y)) < 0.86 * r,
        "triangle": (y < 0.8 * r) & (y > -r + 1.9 * abs(x)),
        "ring": (radius < r) & (radius > 0.55 * r),
        "cross": (np.minimum(abs(x), abs(y)) < 0.3 * r) & (np.maximum(abs(x), abs(y)) < r),
        "diamond": abs(x) + abs(y) < r,
        "bar": (abs(y) < 0.36 * r) & (abs(x) < r),
    }[kind]
    return inside.reshape(CELL, samples, CELL, samples).mean((1, 3)).astype(np.float32)


@functools.cache
def _written_digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 images of 8 x 8 in [0, 1] and their labels."""
    # The file of `sklearn.datasets.load_digits`, which would import all of the package: over a second in every run.
    (folder,) = find_spec("sklearn").submodule_search_locations  # type: ignore[union-attr]
    with gzip.open(Path(folder, "datasets", "data", "digits.csv.gz"), "rt", encoding="ascii") as file:
        table = np.loadtxt(file, np.float32, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8) / 16, table[:, -1].astype(np.int64)


def _digit_mask(rng: np.random.Generator, writing: int) -> np.ndarray:
    """The handwriting on 14 pixels of the cell, slightly turned, sheared and scaled (bilinear)."""
    images, _ = _written_digits()
    source = np.zeros((12, 12), np.float32)
    source[2:10, 2:10] = images[writing]
    angle, shear, scale = rng.uniform(-0.12, 0.12), rng.uniform(-0.12, 0.12), rng.uniform(0.92, 1.06)
    y, x = _cell_grid()
    x, y = (x + shear * y) / scale, y / scale
    x, y = np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y
    x, y = np.clip(x * 8 / 14 + 5.5, 0, 10.999), np.clip(y * 8 / 14 + 5.5, 0, 10.999)
    i, j = y.astype(int), x.astype(int)
    fy, fx = y - i, x - j
    top = source[i, j] * (1 - fx) + source[i, j + 1] * fx
    bottom = source[i + 1, j] * (1 - fx) + source[i + 1, j + 1] * fx
    return np.clip(1.25 * (top * (1 - fy) + bottom * fy), 0, 1).astype(np.float32)


@functools.cache
def _cell_grid() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    return y, x
