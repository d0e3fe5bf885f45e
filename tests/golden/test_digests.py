"""Checkpoints of the presets whose bytes do not depend on the processor: what must not move numbers has not moved them."""

import importlib.util
import json
from pathlib import Path

import pytest
from conftest import FAMILIES, ROOT

KEPT = json.loads((Path(__file__).parent / "digests.json").read_text())


def test_every_shipped_family_has_its_digests() -> None:
    assert set(KEPT) <= set(FAMILIES)
    assert len(KEPT) == 4


@pytest.mark.parametrize("model", sorted(KEPT))
def test_checkpoints_are_what_they_were(model: str, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("digests", ROOT / "benchmarks" / "digests.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {method: digest for _, method, digest in module.digests([model], sorted(KEPT[model]), tmp_path)}
    assert found == KEPT[model]
