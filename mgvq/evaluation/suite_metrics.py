"""What is made of the scores of the public benchmarks: accuracies, what chance adds to them, and averages over tasks."""

import math

import numpy as np
import pandas as pd

from mgvq.evaluation.means import by_type, mean


def metrics(name: str, samples: pd.DataFrame) -> dict[str, float]:
    """The metrics of one task; NaN as soon as one of their samples has no score.

    `accuracy` is the mean score (also by type), with no point for an answer that names none of the options; `unparsed` the
    share of those. Where there are options to choose from, `chance` is what choosing blindly would score, and in `corrected` a
    wrong choice of k options costs 1/(k - 1), so that blind choices and unreadable answers both come to 0 and right ones to 1.
    """
    guessing = {f"{name}/chance": mean(samples.chance), f"{name}/corrected": mean(samples.corrected)}
    return {
        f"{name}/accuracy": mean(samples.score),
        **{f"{name}/accuracy/{kind}": value for kind, value in by_type(samples, "score").items()},
        f"{name}/unparsed": 1 - mean(_parsed(samples)),
        **(guessing if samples.chance.any() else {}),
    }


def averages(samples: pd.DataFrame) -> dict[str, float]:
    """The metrics over all tasks, each of which counts alike; NaN as soon as one sample has no score.

    They are accuracy, `corrected` (where there is nothing to choose from, the score), and `unparsed`.
    """
    tasks = [task for _, task in samples.groupby("task")]
    score, corrected, parsed = (
        mean([mean(column(task)) for task in tasks]) for column in (lambda t: t.score, lambda t: t.corrected, _parsed)
    )
    return {"suite/accuracy": score, "suite/corrected": corrected, "suite/unparsed": 1 - parsed}


def _parsed(samples: pd.DataFrame) -> pd.Series:
    """Whether an answer could be read, NaN where it has no score."""
    return samples.parsed.where(np.isfinite(samples.score), math.nan)
