"""How every figure of a study looks, and how it is written: equal numbers give equal bytes."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 8.6  # inches: what a README shows unscaled
# Okabe and Ito (2008): told apart with any colour vision, black apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
QUIET = "#6b6b6b"
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "mgvq",
    "svg.fonttype": "none",  # text stays text: small, searchable, and read aloud
    "font.sans-serif": ["DejaVu Sans"],  # every text names all of them
    "text.parse_math": False,  # an arm may have dollars in its name
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


@contextmanager
def style() -> Iterator[None]:
    """The common style: figures are made and saved inside of this context."""
    with mpl.rc_context({**mpl.rcParamsDefault, **_STYLE}):  # type: ignore[arg-type]
        yield


def look(number: int) -> dict[str, Any]:
    """The colour and the marker of the series `number`; no two of the first 49 are alike."""
    turn, colour = divmod(number, len(COLOURS))
    return {"color": COLOURS[colour], "marker": MARKERS[(colour + turn) % len(MARKERS)]}


def panels(num_rows: int, num_columns: int, height: float, **options: Any) -> tuple[Figure, list[list[Axes]]]:
    """A figure of the common width, `height` inches high, and its axes by row and column."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(num_rows, num_columns, squeeze=False, **options).tolist()


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as SVG, without date and version, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the viewer's font draws it
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    path.write_text(_compact(_settled(text.getvalue())), encoding="utf-8")
    return path


def _settled(svg: str) -> str:
    """An SVG without what differs between processors: the last bits of coordinates, and ids that are digests of them.

    Coordinates get three decimals (of a point: far below what a screen shows), ids are numbered.
    """
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"\d+\.\d{4,}", lambda match: f"{float(match[0]):.3f}", tag[0]), svg)
    found = re.findall(r' id="(\w+?[0-9a-f]{10})"', svg)
    names = {name: f"{name[:-10]}{number}" for number, name in enumerate(dict.fromkeys(found), 1)}
    return re.sub(r"\w+?[0-9a-f]{10}\b", lambda match: names.get(match[0], match[0]), svg)


def _compact(svg: str) -> str:
    """An SVG that looks the same and says less: the style of markers stands once, in their group, and nothing is indented."""
    svg = re.sub(r"<g( [^>]*)?>\n((?:\s*<use [^>]*/>\n)+)\s*</g>", _with_one_style, svg)
    return re.sub(r"\n\s+", "\n", svg)


def _with_one_style(group: re.Match[str]) -> str:
    """A group of markers; those that differ in style stay as they are, and those with an opacity, which is not inherited."""
    attributes, markers = group[1] or "", group[2]
    styles = set(re.findall(r' style="[^"]*"', markers))
    plain = len(styles) == 1 and markers.count(" style=") == markers.count("<use ") and not re.search(r'[" ]opacity:', markers)
    if not plain or "style=" in attributes:
        return group[0]
    return f"<g{attributes}{(own := styles.pop())}>\n{markers.replace(own, '')}</g>"
