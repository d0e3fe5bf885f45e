"""Scores of several sensitivities on one model, each over several calibrations: what `mgvq-sensitivity` compares."""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_

import pandas as pd
import torch

from mgvq.calibration.examples import further_batches
from mgvq.curvature.statistics import collect
from mgvq.errors import UserError
from mgvq.model.load import Loaded
from mgvq.model.sites import Scope, list_sites, site_weights
from mgvq.protocols import Calibration, Sensitivity
from mgvq.types import Needs


def score(
    loaded: Loaded, scope: Scope, calibrations: Sequence[Calibration], metrics: Mapping[str, Sequence[Sensitivity]]
) -> pd.DataFrame:
    """The channel scores by every definition in `metrics`, which has a variant for every calibration.

    The frame has a row for every calibration (`seed`, by its number), layer and input `channel`, and a column a definition. One
    pass over the data of each calibration collects what all definitions read. Raises UserError as the passes do, and where a
    score is not finite.
    """
    sites = list_sites(loaded.model, scope)
    weights = site_weights(loaded.model, sites)
    parts = []
    for seed, calibration in enumerate(calibrations):
        chosen = {name: variants[seed] for name, variants in metrics.items()}
        needs = reduce(or_, (variant.needs for variant in chosen.values()), Needs())
        drawn, bank = calibration.draw(), {}
        if needs:
            batches, further = drawn.batches(loaded.processor), further_batches(drawn, loaded.processor)
            bank = collect(loaded.model, sites, batches, needs, drawn.label_seed, further)
        scores = {name: variant(weights, bank) for name, variant in chosen.items()}
        for site in sites:
            for name, by_site in scores.items():
                if not torch.isfinite(by_site[site]).all():
                    raise UserError(f"sensitivity={name} gives channels of {site.name} a score that is not finite.")
            columns = {name: by_site[site].numpy() for name, by_site in scores.items()}
            parts.append(pd.DataFrame({"seed": seed, "layer": site.name, "channel": range(site.in_features), **columns}))
    return pd.concat(parts, ignore_index=True)
