"""The twelve question types of the tiny VQA: templates, exact answers, and which of them make the headline.

Answers that need several right tokens react to quantisation, one-word look-ups hardly do. So counting, count comparison,
position, lists and digit reading are the headline, each with the same weight; the rest are controls, reported apart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mgvq.data.tiny_vqa.scene import COLORS, DIGIT, GRID, KINDS, NUMBERS, SHAPES, SIZES, Scene, Thing

# Fixed before the first training run and not eased afterwards (tests/golden holds a copy).
HEADLINE = {"count": 1, "cmp_count": 1, "where": 1, "list_row": 1, "list_color": 1, "list_all": 1, "digit": 1}
CONTROLS = ("color", "shape", "exist", "cmp_size", "relation")
# How often each type is asked in training.
TRAINING_MIX = {
    "count": 1.5, "cmp_count": 1.0, "where": 1.0, "list_row": 1.0, "list_color": 1.0, "list_all": 0.7, "digit": 1.0,
    "color": 0.4, "shape": 0.4, "exist": 0.6, "cmp_size": 0.3, "relation": 0.6,
}  # fmt: skip
NOTHING = "nothing"
DIRECTIONS = {"left of": -1, "right of": 1, "above": -GRID, "below": GRID}


@dataclass(frozen=True, slots=True)
class Question:
    """Text and exact answer, words separated by single spaces."""

    type: str
    text: str
    answer: str


def ask(scene: Scene, question_type: str, rng: np.random.Generator) -> Question | None:
    """A random question of the type, None where the scene has no such question (no digit to read, say)."""
    drawn = _ASKERS[question_type](scene.things, rng)
    return None if drawn is None else Question(question_type, *drawn)


def num_answers(question_type: str) -> int | None:
    """How many different answers the type has (chance level is its inverse); None for lists, where chance is practically 0."""
    return {
        "count": 9, "cmp_count": 2, "where": GRID * GRID, "digit": 10, "color": len(COLORS), "shape": len(KINDS),
        "exist": 2, "cmp_size": 2, "relation": len(KINDS),
    }.get(question_type)  # fmt: skip


def parses(question_type: str, text: str) -> bool:
    """Whether `text` is made of the words that answers of this type are made of; only those count as an answer at all."""
    words = text.split()
    return bool(words) and set(words) <= _ANSWER_WORDS[question_type]


def corpus() -> list[str]:
    """One text of every template filled with every word: the tokenizer's training text, so that each word is one token."""
    words = [*COLORS, *KINDS, *map(_plural, KINDS), *NUMBERS, "small", "big", "yes", "no", NOTHING, "thing", "things"]
    templates = [
        "how many things are there ?", "are there more circles than rings ?", "where is the red thing ? row one column two",
        "list row two :", "list all red things :", "list all things :", "which digit is the red digit ?",
        "what color is the circle ?", "what is the red thing ?", "is there a red circle ?",
        "is the red circle bigger than the blue ring ?", *(f"what is {d} the red circle ?" for d in DIRECTIONS),
    ]  # fmt: skip
    return templates * 20 + [f"{w} {v}" for w in words for v in words]


Drawn = tuple[str, str] | None
Things = tuple[Thing, ...]
_T = TypeVar("_T")


def _pick(rng: np.random.Generator, options: list[_T]) -> _T:
    return options[rng.integers(len(options))]


def _unique(things: Things, kinds: tuple[str, ...] = KINDS) -> list[Thing]:
    """The things that "the red circle" names without doubt."""
    names = [(t.color, t.kind) for t in things]
    return [t for t in things if t.kind in kinds and names.count((t.color, t.kind)) == 1]


def _describe(thing: Thing) -> str:
    return f"{thing.color} {thing.name}" if thing.digit is not None else f"{thing.size} {thing.color} {thing.name}"


def _plural(kind: str) -> str:
    return f"{kind}es" if kind.endswith("s") else f"{kind}s"


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _count(things: Things, rng: np.random.Generator) -> Drawn:
    what = rng.integers(10)
    if what == 0:
        return "how many things are there ?", NUMBERS[len(things)]
    attribute = "color" if what < 5 else "kind"
    options = list(COLORS if attribute == "color" else KINDS)
    value = _pick(rng, [getattr(t, attribute) for t in things] if rng.random() < 0.85 else options)
    noun = f"{value} things" if attribute == "color" else _plural(value)
    return f"how many {noun} are there ?", NUMBERS[sum(getattr(t, attribute) == value for t in things)]


def _cmp_count(things: Things, rng: np.random.Generator) -> Drawn:
    """Yes and no equally often: the difference that is asked for is drawn first."""
    attribute = ("color", "kind")[rng.integers(2)]
    counts = {v: sum(getattr(t, attribute) == v for t in things) for v in (COLORS if attribute == "color" else KINDS)}
    wants_yes = rng.random() < 0.5
    present = [v for v in counts if counts[v]]
    pairs = [
        (a, b)
        for a in (present if wants_yes else list(counts))
        for b in (present if not wants_yes else list(counts))
        if a != b and (counts[a] > counts[b]) == wants_yes
    ]
    if not pairs:
        return None
    a, b = _pick(rng, pairs)
    first, second = (f"{v} things" if attribute == "color" else _plural(v) for v in (a, b))
    return f"are there more {first} than {second} ?", _yes(wants_yes)


def _where(things: Things, rng: np.random.Generator) -> Drawn:
    if not (unique := _unique(things)):
        return None
    thing = _pick(rng, unique)
    answer = f"row {NUMBERS[thing.row + 1]} column {NUMBERS[thing.column + 1]}"
    return f"where is the {thing.color} {thing.kind} ?", answer


def _list_row(things: Things, rng: np.random.Generator) -> Drawn:
    rows = sorted({t.row for t in things}) if rng.random() < 0.9 else list(range(GRID))
    row = _pick(rng, rows)
    listed = " ".join(_describe(t) for t in things if t.row == row)
    return f"list row {NUMBERS[row + 1]} :", listed or NOTHING


def _list_color(things: Things, rng: np.random.Generator) -> Drawn:
    color = _pick(rng, [t.color for t in things] if rng.random() < 0.9 else list(COLORS))
    listed = " ".join(t.name if t.digit is not None else f"{t.size} {t.name}" for t in things if t.color == color)
    return f"list all {color} things :", listed or NOTHING


def _list_all(things: Things, _: np.random.Generator) -> Drawn:
    return "list all things :", " ".join(_describe(t) for t in things)


def _digit(things: Things, rng: np.random.Generator) -> Drawn:
    if not (digits := _unique(things, (DIGIT,))):
        return None
    digit = _pick(rng, digits)
    return f"which digit is the {digit.color} digit ?", digit.name


def _color(things: Things, rng: np.random.Generator) -> Drawn:
    kinds = [t.kind for t in things]
    if not (unique := [t for t in things if kinds.count(t.kind) == 1]):
        return None
    thing = _pick(rng, unique)
    return f"what color is the {thing.kind} ?", thing.color


def _shape(things: Things, rng: np.random.Generator) -> Drawn:
    colors = [t.color for t in things]
    if not (unique := [t for t in things if colors.count(t.color) == 1]):
        return None
    thing = _pick(rng, unique)
    return f"what is the {thing.color} thing ?", thing.kind


def _exist(things: Things, rng: np.random.Generator) -> Drawn:
    """Half no, and most of those hard: colour and kind are both there, but not on one thing."""
    pairs = sorted({(t.color, t.kind) for t in things})
    if rng.random() < 0.5:
        color, kind = _pick(rng, pairs)
        return f"is there a {color} {kind} ?", "yes"
    colors, kinds = (sorted({p[i] for p in pairs}) for i in (0, 1))
    absent = [(c, k) for c in colors for k in kinds if (c, k) not in pairs]
    absent = absent or [(c, k) for c in COLORS for k in kinds if (c, k) not in pairs]
    color, kind = _pick(rng, absent)
    return f"is there a {color} {kind} ?", "no"


def _cmp_size(things: Things, rng: np.random.Generator) -> Drawn:
    unique = _unique(things, SHAPES)
    wants_yes = rng.random() < 0.5
    pairs = [(a, b) for a in unique for b in unique if a is not b and ((a.size, b.size) == ("big", "small")) == wants_yes]
    if not pairs:
        return None
    a, b = _pick(rng, pairs)
    return f"is the {a.color} {a.kind} bigger than the {b.color} {b.kind} ?", _yes(wants_yes)


def _relation(things: Things, rng: np.random.Generator) -> Drawn:
    """The kind of the thing in the very next cell."""
    by_cell = {t.cell: t for t in things}
    options = []
    for thing in _unique(things):
        for words, step in DIRECTIONS.items():
            other = by_cell.get(thing.cell + step)
            same_line = other and (other.row == thing.row or other.column == thing.column)
            if other and same_line:
                options.append((f"what is {words} the {thing.color} {thing.kind} ?", other.kind))
    return _pick(rng, options) if options else None


_ASKERS: dict[str, Callable[[Things, np.random.Generator], Drawn]] = {
    "count": _count, "cmp_count": _cmp_count, "where": _where, "list_row": _list_row, "list_color": _list_color,
    "list_all": _list_all, "digit": _digit, "color": _color, "shape": _shape, "exist": _exist, "cmp_size": _cmp_size,
    "relation": _relation,
}  # fmt: skip

_THING_WORDS = {*SHAPES, *NUMBERS, NOTHING}
_ANSWER_WORDS: dict[str, set[str]] = {
    "count": set(NUMBERS), "digit": set(NUMBERS), "color": set(COLORS), "shape": set(KINDS), "relation": set(KINDS),
    "cmp_count": {"yes", "no"}, "exist": {"yes", "no"}, "cmp_size": {"yes", "no"},
    "where": {"row", "column", *NUMBERS[1 : GRID + 1]}, "list_color": {*SIZES, *_THING_WORDS},
    "list_row": {*SIZES, *COLORS, *_THING_WORDS}, "list_all": {*SIZES, *COLORS, *_THING_WORDS},
}  # fmt: skip
