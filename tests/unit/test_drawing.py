"""Written figures: equal numbers give equal bytes on any processor."""

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
