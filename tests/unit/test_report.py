"""Figures and the HTML report, on made-up runs whose numbers can be followed."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import declare_done, write_finished_run
from omegaconf import OmegaConf
from PIL import Image

from mgvq.analysis.examples import examples
from mgvq.analysis.figures.drawing import style
from mgvq.analysis.figures.layer_figures import has_stages, heat_map, proxy_figure, varies
from mgvq.analysis.figures.study_figures import arms_figure, has_bit_widths
from mgvq.analysis.html import write_html
from mgvq.analysis.records import layers as layers_module
from mgvq.analysis.records.collect import collect
from mgvq.analysis.records.layers import codebook_usage, collect_layers, evenness, read_layers, write_layers
from mgvq.analysis.records.recorded import Recorded
from mgvq.analysis.records.records import RunRecord, StudyRecord
from mgvq.analysis.report import write_figures
from mgvq.analysis.tables.limits_table import limits_table, write_limits
from mgvq.analysis.tables.table import rows
from mgvq.analysis.two_studies import file_differences, shared_arms, write_two
from mgvq.analysis.verdict import verdict
from mgvq.cli import report as reporting
from mgvq.errors import UserError
from mgvq.evaluation.documents import documents, headline_accuracy
from mgvq.formats.columns import ColumnWeight
from mgvq.formats.exponent import ExponentWeight
from mgvq.formats.grouped import GroupedWeight, pack_groups
from mgvq.formats.vector import VectorWeight
from mgvq.runs.places import conf_folder
from mgvq.runs.store import RunFolder
from mgvq.studies.plan import PlannedRun
from mgvq.studies.spec import Study

STUDY = Study(
    name="made_up",
    question="is <good> better than bad?",
    arms={"full": ["method=full_precision"], "bad": ["a=1"], "good": ["a=2"]},
    seeds=[0, 1, 2],
    grid={"model": ["one", "two"]},
    baseline="bad",
    primary={"arm": "good", "metric": "loss"},
)
WRONG = {"full": 20, "bad": 2, "good": 5}  # every so-manieth question is answered wrongly
DOCS = documents(0, 40)
SITES = ["a.q_proj", "a.down_proj"]


def finish(folder: Path, arm: str, seed: int) -> None:
    lines = []
    for number, doc in enumerate(DOCS):
        right = (number + seed * (arm != "full")) % WRONG[arm] != 1
        line = {key: doc[key] for key in ("sample_id", "sample_hash", "type", "question", "answer")}
        prediction = doc["answer"] if right else f"{arm} & nonsense"
        loss = (0.1 if right else 2.0) + 0.01 * (number % 3)
        lines.append({"task": "tiny_vqa", **line, "prediction": prediction, "score": float(right), "loss": loss, "num_tokens": 2})
    samples = pd.DataFrame(lines)
    by_type = samples.groupby("type").score.mean()
    metrics = {
        "tiny_vqa/accuracy": headline_accuracy(samples[["type", "score"]].to_dict("records")),
        **{f"tiny_vqa/accuracy/{kind}": value for kind, value in by_type.items()},
        "loss/answer": samples.loss.sum() / samples.num_tokens.sum(),
        "kl/full_precision": 0.1,
        "bits/quantized_layers": 16.0 if arm == "full" else 2.0,
        "rate": "full_precision" if arm == "full" else "mixed",
    }
    tables = {}
    if arm != "full":
        layer = pd.DataFrame({"site": SITES, "tower": "language", "kind": ["q_proj", "down_proj"], "block": [0, 0]})
        by_group = pd.concat([layer.assign(group=g, num_channels=4, num_weights=16 * (g + 1)) for g in (0, 1)])
        tables["allocation"] = by_group.assign(score=[4.0, 8.0, 40.0, 80.0], index_bits=[1.0, 1.0, 3.0, 3.0 + seed])
        tables["layers"] = layer.assign(proxy_error=[0.5, 0.25], times_limit=[2.0, 4.0 + seed])
        stages = [layer.assign(part="nearest", proxy_error=[2.0, 1.0]), layer.assign(part="feedback", proxy_error=[0.5, 0.25])]
        tables["proxy"] = pd.concat(stages)
    write_finished_run(folder, samples, metrics, **tables)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def runs(results: Path) -> list[PlannedRun]:
    cfg = OmegaConf.create({"evaluation": OmegaConf.load(conf_folder() / "evaluation" / "tiny_vqa.yaml")})
    planned = []
    for point in STUDY.points():
        for arm in STUDY.arms:
            for seed in STUDY.seeds:
                folder = results / "runs" / f"{point['model']}-{arm}-{0 if arm == 'full' else seed}"
                if not folder.exists():
                    finish(folder, arm, seed)
                overrides = (f"model={point['model']}", f"arm={arm}", f"seed={seed}")
                planned.append(PlannedRun(arm, point, seed, overrides, RunFolder(folder), cfg))
    return planned


@pytest.fixture(scope="module")
def record(runs: list[PlannedRun]) -> StudyRecord:
    return collect(STUDY, runs)


@pytest.fixture(scope="module")
def layers(runs: list[PlannedRun]) -> pd.DataFrame:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers_module, "codebook_usage", lambda _: {(site, g): 0.5 for site in SITES for g in (0, 1)})
        return collect_layers(runs)


def test_the_table_by_layer_has_means_over_distinct_runs(layers: pd.DataFrame, tmp_path: Path) -> None:
    write_layers(layers, tmp_path / "x.parquet")
    pd.testing.assert_frame_equal(read_layers(tmp_path / "x.parquet"), layers)
    assert set(layers.arm) == {"bad", "good"}
    assert len(layers) == 2 * 2 * (4 * 4 + 2 + 2 + 2 * 2)
    last = layers[(layers.site == "a.down_proj") & (layers.group == 1)].groupby("quantity").value.first()
    assert dict(last) == {"bits": 4.0, "sensitivity": 20.0, "usage": 0.5, "weights": 32.0}


@pytest.mark.parametrize(
    ("codes", "tables", "size", "expected"),
    [
        ([[0, 1], [2, 3]], 1, 4, 1.0),
        ([[0, 0], [0, 0]], 1, 4, 0.0),
        ([[0, 0], [1, 1]], 1, 4, 0.5),
        ([[0, 1], [1, 1]], 2, 2, 0.5),  # two tables in turn: one used evenly, one at a single entry
    ],
)
def test_usage_is_the_entropy_of_the_codes_over_its_maximum(
    codes: list[list[int]], tables: int, size: int, expected: float
) -> None:
    assert evenness(np.array(codes)[..., None], tables, size) == pytest.approx(expected)


def test_every_weight_with_a_codebook_has_its_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is wrapped in: by columns, times a power of two, as a channel group."""
    vectors = VectorWeight(torch.tensor([[[0], [0]], [[1], [1]]]), torch.zeros(1, 4, 2, dtype=torch.float16), 4)
    columns = ColumnWeight(VectorWeight(vectors.codes, vectors.table, 4))
    grouped = GroupedWeight((columns, ExponentWeight(columns, 30)), pack_groups(torch.tensor([0, 0, 1, 1])), 4)
    weights = {"a": vectors, "b": columns, "c": ExponentWeight(vectors, 30), "d": grouped}
    stored = [SimpleNamespace(name=n, format=w.format, tensors=w.tensors(), settings=w.settings()) for n, w in weights.items()]
    monkeypatch.setattr("mgvq.checkpoint.load.read", lambda _: (stored, {}))
    assert codebook_usage(Path()) == dict.fromkeys([("a", 0), ("b", 0), ("c", 0), ("d", 0), ("d", 1)], pytest.approx(0.5))


def test_the_table_of_limits_has_a_column_a_kind(layers: pd.DataFrame, tmp_path: Path) -> None:
    """The mean over seeds of 4, 5 and 6; and what runs of before there were limits leave is no table."""
    written = {file.name: file.read_text() for file in write_limits("made_up", layers, tmp_path)}
    assert set(written) == {f"made_up_limits{suffix}" for suffix in (".md", ".csv", ".tex")}
    header, _, *lines = written["made_up_limits.md"].splitlines()[:6]
    assert [cell.strip() for cell in header.split("|")[1:-1]] == ["point", "arm", "language q_proj", "language down_proj"]
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == ["one", "bad", "2", "5"]
    assert len(lines) == 4
    twice = pd.concat([layers, layers[layers.site == "a.q_proj"].assign(site="b.q_proj")])
    twice.loc[(twice.site == "b.q_proj") & (twice.quantity == "times_limit"), "value"] = 8.0
    assert limits_table(twice).lines[0][2:] == ["4", "5"], "a geometric mean"
    twice.loc[(twice.site == "b.q_proj") & (twice.quantity == "weights"), "value"] *= 3
    assert limits_table(twice).lines[0][2:] == [f"{(2 * 8**3) ** 0.25:.3g}", "5"], "by their weights"
    assert write_limits("old", layers[layers.quantity != "times_limit"], tmp_path) == []


def test_the_proxy_figure_shows_every_stage_over_the_nearest(layers: pd.DataFrame) -> None:
    assert has_stages(layers)
    with style():
        figure = proxy_figure(layers)
    assert len(figure.axes) == 4
    assert list(figure.axes[0].lines[0].get_ydata()) == pytest.approx([0.25, 0.25])
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.25"]


def test_heat_maps_show_the_values_and_leave_out_what_is_alike(layers: pd.DataFrame) -> None:
    assert varies(layers, "bits")
    assert not varies(layers, "usage")
    with style():
        bits, scores = (heat_map(layers, quantity) for quantity in ("bits", "sensitivity"))
    assert bits.axes[0].images[0].get_array().tolist() == [[1, 3], [1, 4]]
    # Mean scores 1, 10, 2, 20 of 16, 32, 16, 32 weights: over 10.5.
    shown = scores.axes[0].images[0].get_array()
    assert np.asarray(shown) == pytest.approx(np.log10(np.array([[1, 10], [2, 20]]) / 10.5), abs=1e-6)


def test_the_figure_of_arms_shows_the_tables_differences(record: StudyRecord) -> None:
    table = rows(record)
    with style():
        figure = arms_figure(table, "bad")
    good = next(row for row in table if row.arm == "good")
    dots = [line for line in figure.axes[1].lines if line.get_marker() == "o"]
    effect = good.comparisons["loss"].effect
    assert any(line.get_xdata()[0] == pytest.approx(effect.mean) for line in dots)
    assert not has_bit_widths(table)


def test_equal_records_give_equal_figures(record: StudyRecord, layers: pd.DataFrame, tmp_path: Path) -> None:
    first, second = ({f.name: f.read_bytes() for f in write_figures("x", record, layers, tmp_path / str(i))} for i in range(2))
    assert first == second
    assert set(first) == {f"x_{kind}.svg" for kind in ("arms", "allocation", "sensitivity", "proxy")}
    assert not any(b"dc:date" in svg or b"Matplotlib v" in svg for svg in first.values())


def test_the_verdict_reads_the_planned_comparison(record: StudyRecord) -> None:
    summary, *sentences = verdict(record)
    assert summary == "The planned comparison, good against bad by answer loss: better than bad on 2 of 2 grid points."
    good = next(row for row in rows(record) if row.arm == "good")
    assert f"{good.comparisons['loss'].effect.mean:+.3f} nats a token" in sentences[0]


def test_examples_follow_their_rule(record: StudyRecord, results: Path, tmp_path: Path) -> None:
    found = examples(record, results / "runs")
    assert len(found) == 2
    for example in next(iter(found.values())):
        by_arm = {arm: (given.text, given.is_right) for given in example.answers for arm in given.arms}
        assert by_arm["full"] == (example.answer, True)
        assert by_arm["good"][1] != by_arm["bad"][1]
        assert example.image.startswith("data:image/png;base64,")
    assert examples(record, tmp_path) == {}


def test_an_image_that_is_another_one_is_refused(record: StudyRecord, results: Path, tmp_path: Path) -> None:
    shutil.copytree(results / "runs", tmp_path / "runs")
    for file in (tmp_path / "runs").glob("*/samples.parquet"):
        pd.read_parquet(file).assign(sample_hash="0").to_parquet(file)
        declare_done(file.parent)
    with pytest.raises(UserError, match="another image"):
        examples(record, tmp_path / "runs")


@pytest.fixture(scope="module")
def page(record: StudyRecord, layers: pd.DataFrame, results: Path) -> Path:
    write_figures(STUDY.name, record, layers, results)
    return write_html(STUDY.name, STUDY, record, results)


def test_the_page_stands_alone_and_escapes(page: Path) -> None:
    text = page.read_text()
    assert "Is &lt;good&gt; better than bad?" in text
    assert "bad &amp; nonsense" in text
    assert not re.search(r"(src|href)=\"(https?:)?//", text)
    links = re.findall(r'href="(\.\./[^"]+)/"', text)
    assert len(links) == 2 * (1 + 3 + 3)
    assert all((page.parent / link / "metrics.json").is_file() for link in links)
    assert "mgvq-run model=two arm=good seed=2" in text
    assert len(re.findall(r'<img src="data:image/svg\+xml;base64,', text)) == 4


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here to look at the page with")
def test_a_browser_sorts_the_table_and_shows_all_pictures(page: Path, tmp_path: Path) -> None:
    probe = """<script>addEventListener("load", () => {
    document.querySelectorAll("#tables thead button")[2].click();
    const cells = [...document.querySelectorAll("#tables table")[0].tBodies[0].rows].map(r => parseFloat(r.cells[2].textContent));
    const broken = [...document.images].filter(i => !i.complete || i.naturalWidth === 0).length;
    document.title = JSON.stringify([cells, broken, document.images.length, document.documentElement.scrollWidth > innerWidth]);
    })</script></body>"""
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", probe))
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=600,2000",
        f"--user-data-dir={tmp_path}/b",
    ]
    done = subprocess.run([*command, "--dump-dom", probed.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    cells, broken, number, overflows = json.loads(re.search("<title>(.*?)</title>", done.stdout)[1].replace("&quot;", '"'))
    assert cells == sorted(cells)
    assert len(set(cells)) == 3
    assert broken == 0
    assert number > 4
    assert not overflows
    shot = tmp_path / "page.png"
    subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], capture_output=True, timeout=120, check=True)
    assert np.asarray(Image.open(shot).convert("L")).std() > 10  # something is on it


def test_two_studies_stand_side_by_side_and_escape(record: StudyRecord, results: Path, page: Path) -> None:
    """The page of the first has written its figures."""
    other = replace(STUDY, name="other", question="or <worse>?", seeds=[0, 1])
    text = write_two((STUDY, record), (other, record), results).read_text()
    assert "is &lt;good&gt; better than bad?" in text
    assert "or &lt;worse&gt;?" in text
    assert file_differences(STUDY, other) == [["seeds", "[0, 1, 2]", "[0, 1]"]]
    header, lines = shared_arms(record, record)
    assert len(lines) == 2 * 3
    assert {line[header.index("loss, B - A")] for line in lines} == {"+0.000"}
    assert "Both answered the same questions." in text
    assert not re.search(r"(src|href)=\"(https?:)?//", text)
    assert "other has no such figure." in text


def test_with_two_seeds_the_verdict_is_suggestive(record: StudyRecord) -> None:
    """However clear the difference: here each answer costs 0.1 nats instead of 2."""
    number = len(record.questions)

    def clear(run: RunRecord, arm: str) -> RunRecord:
        noise = 0.01 * np.random.default_rng(run.seeds[0]).random(number)
        return replace(run, losses=noise + (2.0 if arm == "bad" else 0.1))

    cells = [replace(c, runs=tuple(clear(run, c.arm) for run in c.runs if min(run.seeds) < 2)) for c in record.cells]
    two = replace(record, cells=tuple(cells), questions=record.questions.assign(picture=range(number)))
    summary, sentence, *_, warning = verdict(two)
    assert "suggestively better on 2 of 2 grid points" in summary
    assert "good is suggestively better: " in sentence
    assert warning.startswith("With 2 seeds the test is too lenient")


def test_layers_stand_in_the_order_of_the_study_wherever_they_come_from(
    runs: list[PlannedRun], record: StudyRecord, layers: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of some arms are from folders, of the others from a record."""
    here, recorded = layers[layers.arm == "good"], layers[layers.arm == "bad"]
    assert set(layers.arm) == {"good", "bad"}
    monkeypatch.setattr(layers_module, "collect_layers", lambda *_: here)
    monkeypatch.setattr(Recorded, "layers", lambda *_: recorded)
    found = reporting._layers(runs, record, object.__new__(Recorded))
    pd.testing.assert_frame_equal(found, layers.reset_index(drop=True))
