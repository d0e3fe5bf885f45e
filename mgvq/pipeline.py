"""`quantize()`: the algorithm in one screen. No Hydra, no files, no tracking."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel

from mgvq.errors import UserError
from mgvq.model.sites import linear, site_weights
from mgvq.types import Allocation, CalibrationSet, Codebook, Curvature, QuantizedWeight, Rate, Site, StatsBank


@dataclass(frozen=True)
class QuantReport:
    """The quantised layers, the rate they got, one row a layer, the fallbacks taken, and the seconds of each part."""

    weights: Mapping[Site, QuantizedWeight]
    rate: Rate | None
    layers: pd.DataFrame
    flags: tuple[str, ...]
    seconds: Mapping[str, float]


def quantize(
    model: PreTrainedModel,
    processor: Any,
    sites: Sequence[Site],
    *,
    calibration: CalibrationSet | None,
    curvature: Curvature | None,
    allocation: Allocation | None,
    codebook: Codebook | None,
    bits_per_weight: float | None,
) -> QuantReport:
    """Quantise the weights of `sites`; `model` itself stays as it is. Without a codebook nothing is quantised."""
    start = time.perf_counter()
    bank: StatsBank | None = None
    if calibration is not None and curvature is not None:
        bank = curvature.collect(model, sites, calibration.batches(processor))
    calibrated = time.perf_counter()
    if codebook is None or allocation is None or bits_per_weight is None:
        return QuantReport({}, None, _layers(model, {}), (), {"calibrate": 0.0, "quantize": 0.0})
    weights = site_weights(model, sites)
    if bad := [s.name for s, w in weights.items() if not torch.isfinite(w).all()]:
        raise UserError(f"{len(bad)} layers have weights that are not finite, the first {bad[0]}: the model's files are damaged.")
    rate = allocation(sites, codebook, bits_per_weight)
    quantized = codebook.quantize(weights, rate, bank)
    seconds = {"calibrate": calibrated - start, "quantize": time.perf_counter() - calibrated}
    return QuantReport(quantized.weights, rate, _layers(model, quantized.weights), quantized.flags, seconds)


def _layers(model: PreTrainedModel, weights: Mapping[Site, QuantizedWeight]) -> pd.DataFrame:
    """Relative squared error of each layer's weight."""
    rows = []
    for site, quantized in weights.items():
        weight = linear(model, site).weight.detach().float()
        error = (quantized.decode().to(weight.device) - weight).square().sum() / weight.square().sum().clamp(min=1e-30)
        rows.append((site.name, site.tower, site.kind, site.block, site.num_weights, error.item()))
    return pd.DataFrame(rows, columns=["site", "tower", "kind", "block", "num_weights", "relative_error"])
