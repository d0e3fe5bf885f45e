"""The table of large models is what its record says."""

import importlib.util
import json

from conftest import ROOT


def test_the_table_of_large_models_is_that_of_its_record() -> None:
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks" / "scale.py")
    assert spec is not None
    assert spec.loader is not None
    scale = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scale)
    runs = [scale.Measured(**one) for one in json.loads((ROOT / "results" / "records" / "scale.json").read_text())]
    assert (ROOT / "results" / "tables" / "scale.md").read_text() == scale.table(runs)
