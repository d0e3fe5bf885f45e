"""`experiments/e18_peers/choose.py`: settings of presets, judged on held-out proxies."""

import importlib.util

import pytest
from conftest import ROOT

from mgvq.runs.compose import composer


@pytest.fixture(scope="module")
def choose():
    spec = importlib.util.spec_from_file_location("choose", ROOT / "experiments" / "e18_peers" / "choose.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("preset", ["gptq", "rsavq", "quip_sharp"])  # plain; towards moved targets; rotated
def test_a_presets_own_settings_are_judged_first(choose, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ["calibration.num_images=2", "calibration.heldout_images=2"]
    monkeypatch.setattr(choose, "MODELS", {"tiny_llava_onevision": (few, (1,))})
    with composer() as compose:
        row = next(choose.rows([preset], ["tiny_llava_onevision"], compose))
    assert (row["preset"], row["settings"], row["model"]) == (preset, "preset", "tiny_llava_onevision")
    assert 0 < row["proxy"] < 1
    assert 1.8 < row["bits"] <= 2.02
