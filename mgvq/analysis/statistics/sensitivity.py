"""Definitions of sensitivity side by side on one model: by layer, as rank correlations, and over calibration seeds.

Scores travel as a frame with a row for every seed, layer and input channel: `seed, layer, channel`, and a column a definition.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from mgvq.curvature.statistics import collect
from mgvq.model.load import Loaded
from mgvq.model.sites import Scope, list_sites, site_weights
from mgvq.protocols import Calibration, Sensitivity
from mgvq.types import Needs

INDEX = ["seed", "layer", "channel"]


def score(
    loaded: Loaded, scope: Scope, calibrations: Sequence[Calibration], metrics: Mapping[str, Sequence[Sensitivity]]
) -> pd.DataFrame:
    """Scores by every definition in `metrics`, which has a variant for every calibration; `seed` numbers the calibrations.

    One pass over the data of each calibration collects what all definitions read. Raises UserError as the passes do.
    """
    sites = list_sites(loaded.model, scope)
    weights = site_weights(loaded.model, sites)
    parts = []
    for seed, calibration in enumerate(calibrations):
        chosen = {name: variants[seed] for name, variants in metrics.items()}
        needs = reduce(or_, (variant.needs for variant in chosen.values()), Needs())
        drawn = calibration.draw()
        bank = collect(loaded.model, sites, drawn.batches(loaded.processor), needs, drawn.label_seed) if needs else {}
        scores = {name: variant(weights, bank) for name, variant in chosen.items()}
        for site in sites:
            columns = {name: by_site[site].numpy() for name, by_site in scores.items()}
            parts.append(pd.DataFrame({"seed": seed, "layer": site.name, "channel": range(site.in_features), **columns}))
    return pd.concat(parts, ignore_index=True)


def layer_means(scores: pd.DataFrame) -> pd.DataFrame:
    """The mean score of each layer (rows, as they come) by each definition, over its mean in the model."""
    names = _definitions(scores)
    means = {layer: part[names].to_numpy().mean(0) for layer, part in scores.groupby("layer", sort=False)}
    return pd.DataFrame.from_dict(means, orient="index", columns=names) / scores[names].mean()


def rank_correlation(scores: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of every two definitions over channels, mean over seeds.

    Below the diagonal over all channels of the model, above it within layers (mean over layers): the one is what gives bits to
    layers, the other what groups the channels of a layer. NaN where a definition knows no ranks.
    """
    names = _definitions(scores)
    below = np.tri(len(names), dtype=bool)
    values = np.where(below, _spearman(scores, ["seed"]), _spearman(scores, ["seed", "layer"]))
    return pd.DataFrame(values, index=names, columns=names)


def _spearman(scores: pd.DataFrame, keys: list[str]) -> np.ndarray:
    """Within the parts of equal `keys`, then the mean of what is known of them."""
    names = _definitions(scores)
    ranks = [rankdata(part[names], axis=0) for _, part in scores.groupby(keys, sort=False)]
    with np.errstate(invalid="ignore"):  # equal scores have no correlation: NaN
        parts = [np.atleast_2d(np.corrcoef(part, rowvar=False)) for part in ranks]
    return np.ma.masked_invalid(np.stack(parts)).mean(0).filled(np.nan)


def stability(scores: pd.DataFrame) -> pd.DataFrame:
    """Kendall's tau of the channel scores of two seeds, by definition: mean over layers and pairs of seeds, and the worst layer.

    Columns `definition, mean, worst, layer`; NaN and "-" where a definition knows no ranks.
    """
    rows = []
    for name in _definitions(scores):
        tau = pd.Series({layer: _tau(part, name) for layer, part in scores.groupby("layer", sort=False)}).dropna()
        rows.append((name, tau.mean(), tau.min(), tau.idxmin() if len(tau) else "-"))
    return pd.DataFrame(rows, columns=["definition", "mean", "worst", "layer"])


def _tau(part: pd.DataFrame, name: str) -> float:
    """Mean over all pairs of seeds in one layer."""
    tau = part.pivot(index="channel", columns="seed", values=name).corr(method="kendall").to_numpy()
    return float(tau[np.triu_indices(len(tau), 1)].mean())


def _definitions(scores: pd.DataFrame) -> list[str]:
    return [column for column in scores.columns if column not in INDEX]


def write_tables(name: str, scores: pd.DataFrame, results: Path) -> list[Path]:
    """`tables/sensitivity_NAME_ranks.md` and `_stability.md` under `results`; equal scores give equal bytes."""
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
        path.write_text(f"{table.to_markdown(index=False, disable_numparse=True)}\n\n{drawn} {notes[kind]} A dash: no ranks.\n")
        paths.append(path)
    return paths


def number(value: float) -> str:
    """With two decimals; a dash for NaN."""
    return "-" if np.isnan(value) else f"{value:.2f}"
