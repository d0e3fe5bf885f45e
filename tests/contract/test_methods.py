"""Every method meets a budget of 2.0 bits on the shipped models, in stored bits of the layers in scope, without further settings.

Predicted from the layers' shapes alone; that the prediction equals the bytes on disk, every run asserts.
"""

import functools

import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir

from mgvq.model.sites import list_sites
from mgvq.quantization.method import Method
from mgvq.quantization.preflight import predicted_bits
from mgvq.runs.method import build_method
from mgvq.runs.places import conf_folder

METHODS = sorted({f.stem for f in (ROOT / "conf" / "method").glob("*.yaml")} - {"full_precision"})
BUDGET, OVER = 2.0, 0.01  # at most one percent above


@functools.cache
def preset(method: str) -> Method:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        built = build_method(compose("config", [f"method={method}"]))
    assert built is not None
    return built


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["all", "language"])
def test_two_bits_are_at_most_one_percent_more(loaded, method, scope):
    sites = list_sites(loaded.model, scope)
    draws = torch.Generator().manual_seed(0)
    scores = {s: torch.randn(s.in_features, generator=draws).exp() for s in sites}
    bits = predicted_bits(preset(method), sites, BUDGET, scores)
    assert 0.98 * BUDGET <= bits <= (1 + OVER) * BUDGET
