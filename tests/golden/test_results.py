"""What is committed is current and holds: tables and README from records, model cards from weights, the promised response."""

import hashlib
import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import FAMILIES, ROOT, sampled

from mgvq.analysis.records.layers import layers_path, read_layers
from mgvq.analysis.records.records import StudyRecord, metric_frame, read_record
from mgvq.analysis.report import FIGURES, figure_path, pages_with_tables, with_tables, write_figures, write_tables
from mgvq.analysis.tables.paper_tables import write_paper
from mgvq.data.tiny_vqa.questions import HEADLINE
from mgvq.model.source import SHIPPED
from mgvq.studies.plan import distinct, expand
from mgvq.studies.spec import read_study

RESULTS = ROOT / "results"
TRAININGS = sorted(f.parent.name for f in SHIPPED.glob("trainings/*/model.safetensors"))
STUDIES = sorted(p.stem for p in (RESULTS / "records").glob("*.parquet"))
FROZEN = {s.name: s.frozen for p in ROOT.glob("experiments/*/study.yaml") if (s := read_study(p)).frozen}
# As `sha256sum --check tests/golden/frozen.sha256` reads it in the root of the checkout.
DIGESTS = {line[66:]: line[:64] for line in (ROOT / "tests/golden/frozen.sha256").read_text().splitlines()}


def record(study: str) -> StudyRecord:
    return read_record(RESULTS / "records" / f"{study}.parquet")


@pytest.mark.parametrize("study", STUDIES)
def test_tables_are_rebuilt_from_records_to_the_byte(study: str, tmp_path: Path) -> None:
    for file in write_tables(study, record(study), tmp_path):
        assert file.read_bytes() == (RESULTS / "tables" / file.name).read_bytes()


@pytest.mark.parametrize("study", sampled(STUDIES, 3))
def test_figures_are_rebuilt_from_records_to_the_byte(study: str, tmp_path: Path) -> None:
    rebuilt = write_figures(study, record(study), read_layers(layers_path(RESULTS, study)), tmp_path)
    committed = [path for figure in FIGURES if (path := figure_path(RESULTS, study, figure)).is_file()]
    assert sorted(file.name for file in rebuilt) == sorted(file.name for file in committed)
    for file in rebuilt:
        assert file.read_bytes() == (RESULTS / "figures" / file.name).read_bytes()


def test_the_paper_tables_are_rebuilt_to_the_byte(tmp_path: Path) -> None:
    for name in ("paper", "records"):
        (tmp_path / name).symlink_to(RESULTS / name)
    for file in write_paper(tmp_path):
        assert file.read_bytes() == (RESULTS / file.relative_to(tmp_path)).read_bytes()


def test_the_paper_table_says_that_the_abstract_does_not_add_up() -> None:
    lines = (RESULTS / "tables" / "paper.md").read_text().splitlines()
    (line,) = [line for line in lines if "maximum accuracy improvement" in line]
    assert [word.strip() for word in line.split("|")][3:6] == ["4.9 points", "71.4 - 67.0 = 4.4", "does not hold: off by 0.5"]


def test_records_stay_small() -> None:
    assert sum(file.stat().st_size for file in (RESULTS / "records").rglob("*.parquet")) < 10_000_000


def test_the_records_of_frozen_studies_are_what_they_were() -> None:
    files = [path for name in FROZEN for path in (RESULTS / "records" / f"{name}.parquet", layers_path(RESULTS, name))]
    assert {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files} == DIGESTS


@pytest.mark.parametrize("study", sorted(FROZEN))
def test_the_page_of_a_frozen_study_says_so_first(study: str) -> None:
    page = (ROOT / "experiments" / study / "README.md").read_text()
    assert page.partition("\n")[0] == (
        f"> **Frozen at `{FROZEN[study]}`.** This study is not run again: its tables and figures are made from its record, and "
        "commands and settings on this page are those of that commit."
    )


def test_no_other_page_says_so() -> None:
    pages = {p.parent.name for p in ROOT.glob("experiments/*/README.md") if p.read_text().startswith("> **Frozen")}
    assert pages == set(FROZEN)


@pytest.mark.parametrize("study", sorted(set(STUDIES) - set(FROZEN)))
def test_records_are_of_the_runs_that_the_study_names_today(study: str) -> None:
    """A changed setting, weight file or question makes other runs: then the study has to be run and reported again."""
    planned = expand(read_study(ROOT / "experiments" / study / "study.yaml"))
    assert {run.folder.path.name for run in distinct(planned)} == {run.run for run in record(study).runs}
    commands = {shlex.join(run.overrides) for run in planned}
    assert {run.overrides for run in record(study).runs} <= commands, "the commands in the tables make these runs"


def test_the_table_of_moved_presets_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "numerics_3"))
    table = importlib.import_module("compare").table(RESULTS / "records")
    assert (RESULTS / "tables" / "numerics_3_before.md").read_text() == table


def test_the_readmes_show_the_current_tables() -> None:
    texts = {page: page.read_text() for page in pages_with_tables(ROOT)}
    assert "| mgvq2 " in texts[ROOT / "README.md"]
    for text in texts.values():
        assert with_tables(text, RESULTS / "tables") == text


@pytest.fixture(scope="module")
def cards() -> dict[str, str]:
    """All cards, from one process: the script imports its neighbours by their bare names."""
    names = [*FAMILIES, *TRAININGS]
    code = f"from card import card; import json, sys; json.dump({{name: card(name) for name in {names}}}, sys.stdout)"
    folder = ROOT / "experiments" / "train_tiny_vlms"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [*FAMILIES, *TRAININGS])
def test_model_cards_are_current(name: str, cards: dict[str, str]) -> None:
    (weights,) = SHIPPED.rglob(f"{name}/model.safetensors")
    assert cards[name] == (weights.parent / "README.md").read_text()
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in cards[name]
    assert weights.stat().st_size < 10_000_000


def test_the_card_of_the_model_that_is_put_together_is_current() -> None:
    code = "from card import FOLDER, card; assert card() == (FOLDER / 'README.md').read_text()"
    folder = ROOT / "experiments" / "train_smollm2_vlm"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def response(model: str, scope: str) -> pd.Series:
    """Headline accuracy in points by arm, mean over seeds."""
    frame = metric_frame(record("e00_response"))
    part = frame[(frame.model == model) & (frame.scope == scope)]
    return 100 * part.groupby("arm")["tiny_vqa/accuracy"].mean()


def bits(model: str, arm: str) -> pd.Series:
    frame = metric_frame(record("e00_response"))
    return frame[(frame.model == model) & (frame.scope == "all") & (frame.arm == arm)]["bits/quantized_layers"]


@pytest.mark.parametrize("model", FAMILIES)
def test_the_models_answer_and_four_bits_keep_it(model: str) -> None:
    assert record("e00_response").num_samples >= 2000
    accuracy = response(model, "all")
    assert accuracy["full precision"] >= 85
    four_bits = [accuracy["rtn 4 bits, groups of 128"], accuracy["rtn 4 bits, per channel"]]
    assert max(four_bits) >= accuracy["full precision"] - 2


@pytest.mark.parametrize("model", FAMILIES)
def test_two_bit_kmeans_costs_five_points(model: str) -> None:
    accuracy = response(model, "all")
    assert accuracy["kmeans 2 bits"] <= accuracy["full precision"] - 5
    assert bits(model, "kmeans 2 bits").between(1.98, 2.02).all()


@pytest.mark.parametrize("model", FAMILIES)
def test_two_bit_round_to_nearest_costs_ten_points(model: str) -> None:
    accuracy = response(model, "all")
    arms = ["rtn 2 bits, groups of 128", "rtn 2 bits, per channel"]
    assert all((bits(model, arm) <= 2.3).all() for arm in arms)
    assert max(accuracy[arm] for arm in arms) <= accuracy["full precision"] - 10


def test_the_headline_is_the_committed_one() -> None:
    assert dict.fromkeys(("count", "cmp_count", "where", "list_row", "list_color", "list_all", "digit"), 1) == HEADLINE


def test_mixed_precision_by_both_sensitivities_halves_the_loss_of_one_group() -> None:
    """The aim of e03, where the committed record reaches it; equal stored bits in every cell."""
    frame = metric_frame(record("e03_sensitivity"))
    quantised = frame[frame.arm != "full precision"]
    assert quantised["bits/quantized_layers"].between(1.99, 2.01).all()
    loss = frame.groupby(["model", "arm"])["loss/answer"].mean()
    for model in frame.model.unique():
        left = loss[model, "global_local"] - loss[model, "full precision"]
        assert left <= 0.5 * (loss[model, "one group"] - loss[model, "full precision"])
