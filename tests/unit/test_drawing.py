"""Written figures: equal numbers give equal bytes on any processor."""

import io
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from mgvq.analysis.figures.drawing import panels, save, style


def drawn(nudge: float) -> Figure:
    """A line, a map of cells and a bar, whose coordinates move by `nudge`."""
    figure, ((left, right),) = panels(1, 2, 3.0 + nudge)
    left.plot([0, 1 + nudge], [0.00001, 0.00002], marker="o", label="0.00001 of all")
    left.legend()
    cells = right.imshow(
        np.arange(6.0).reshape(2, 3), cmap=mpl.colormaps["viridis"].resampled(40), aspect="auto", interpolation="none"
    )
    figure.colorbar(cells, ax=right)
    return figure


def test_last_bits_do_not_show_and_text_stays(tmp_path: Path) -> None:
    with style():
        one, other, moved = (save(drawn(by), tmp_path / f"{by}.svg").read_text() for by in (0, 1e-10, 1e-2))
    assert one == other != moved
    assert "0.00001 of all" in one


def markers(svg: str) -> list[tuple[str | None, str | None, str | None]]:
    """Every marker with its place and the style that it has by itself or from its group."""
    groups = ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}g")
    found = ((group, use) for group in groups for use in group.findall("{http://www.w3.org/2000/svg}use"))
    return [(use.get("x"), use.get("y"), use.get("style", group.get("style"))) for group, use in found]


def test_a_file_says_once_what_markers_share(tmp_path: Path) -> None:
    plain = io.StringIO()
    with style():
        figure, ((axes,),) = panels(1, 1, 3.0)
        axes.plot(range(300), range(300), marker="o", linestyle="")
        axes.scatter(range(20), range(20), c=range(20), alpha=0.5)
        axes.plot([1, 2], [2, 1], marker="s", linestyle="", alpha=0.5)
        figure.savefig(plain, format="svg", metadata={"Date": None, "Creator": None})
        written = save(figure, tmp_path / "figure.svg").read_text()
    expected, found = markers(plain.getvalue()), markers(written)
    assert len(found) == len(expected) > 320
    for (x, y, own), (written_x, written_y, inherited) in zip(expected, found, strict=True):
        assert (float(written_x or 0), float(written_y or 0)) == (round(float(x or 0), 3), round(float(y or 0), 3))
        assert own == inherited
    assert len(written) < 0.8 * len(plain.getvalue())
