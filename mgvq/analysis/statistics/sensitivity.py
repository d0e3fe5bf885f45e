"""How definitions of channel sensitivity agree: by layer, as rank correlations, and over calibration seeds.

Scores come as the frame that `mgvq.quantization.scoring.score` makes: a row for every seed, layer and input channel, with
`seed, layer, channel`, and a column a definition.
"""

import numpy as np
import pandas as pd
from scipy.stats import rankdata

_INDEX = ("seed", "layer", "channel")


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
    """Spearman's correlation within the parts of equal `keys`, and the mean over those parts in which it is defined."""
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
    """The mean over all pairs of seeds in one layer."""
    tau = part.pivot(index="channel", columns="seed", values=name).corr(method="kendall").to_numpy()
    return float(tau[np.triu_indices(len(tau), 1)].mean())


def _definitions(scores: pd.DataFrame) -> list[str]:
    return [column for column in scores.columns if column not in _INDEX]
