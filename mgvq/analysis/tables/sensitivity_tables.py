"""Tables of a comparison of sensitivities: how definitions agree, and how stable each is."""

from pathlib import Path

import numpy as np
import pandas as pd

from mgvq.analysis.statistics.sensitivity import rank_correlation, stability


def write_tables(name: str, scores: pd.DataFrame, results: Path) -> list[Path]:
    """Write `tables/sensitivity_NAME_ranks.md` and `_stability.md` under `results`, and return them.

    Equal scores give equal bytes.
    """
    seeds = scores.seed.nunique()
    drawn = f"{name}: {scores.layer.nunique()} layers, {len(scores) // seeds:,} input channels, {seeds} calibration seeds."
    ranks = rank_correlation(scores).map(number).reset_index(names="Spearman")
    stable = stability(scores).sort_values("mean", ascending=False, kind="stable")
    stable = stable.assign(mean=stable["mean"].map(number), worst=stable.worst.map(number))
    notes = {
        "ranks": "Below the diagonal over all channels of the model, above it within layers (mean over layers).",
        "stability": "Kendall's tau of the channel ranks of two seeds: mean over layers and pairs of seeds, and the worst layer.",
    }
    paths = []
    for kind, table in (("ranks", ranks), ("stability", stable)):
        path = results / "tables" / f"sensitivity_{name}_{kind}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"{table.to_markdown(index=False, disable_numparse=True)}\n\n{drawn} {notes[kind]} A dash: no ranks.\n",
            encoding="utf-8",
        )
        paths.append(path)
    return paths


def number(value: float) -> str:
    """A number with two decimals; a dash for NaN."""
    return "-" if np.isnan(value) else f"{value:.2f}"
