"""The page of peers has every published preset, with its paper, what differs, and what is said of fine-tuning."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs" / "hooks"))
import peers

PRESETS = {f.stem: peers.read(f).headline for f in (ROOT / "conf" / "method").glob("*.yaml")}
OURS = {"full_precision", "rtn", "kmeans", "kmeans_ldlq", "mgvq", "mgvq2", "mgvq_no_gradient", "mgvq_uniform"}


def test_all_presets_but_ours_and_the_baselines_name_a_paper() -> None:
    assert {name for name, headline in PRESETS.items() if not peers.paper(headline)} == OURS


@pytest.mark.parametrize("name", sorted(set(PRESETS) - OURS))
def test_a_peer_says_what_is_the_same_what_differs_and_whether_it_is_tuned(name: str) -> None:
    said = peers.paragraphs(PRESETS[name])
    assert {"", "Settings", "Deviations", "Fine-tuning"} <= set(said)
    (page,) = peers.pages(ROOT)
    section = page.text.split(f"## {name} {{")[1].split("\n## ")[0]
    assert "**The same**" in section
    assert "**What differs**" in section


def test_figures_are_those_of_the_studies_tables() -> None:
    row = {"perplexity": "37.34", "bits, layers": "2.0021", "quantise s": "297.6"}
    assert peers._cells(row, "perplexity") == ["37.3", "2.002", "298"]
    assert peers._cells({**row, "perplexity": "467527.0"}, "perplexity")[0] == "467,527"
    assert peers._cells(None, "perplexity") == ["-", "-", "-"]
