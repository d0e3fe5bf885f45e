"""`mgvq-sensitivity` writes what it says, and the numbers in its tables are the statistics that they are called."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, run_command, sampled
from PIL import Image
from scipy.stats import kendalltau, spearmanr

from mgvq.analysis.statistics.sensitivity import layer_means, rank_correlation, stability
from mgvq.analysis.tables.sensitivity_tables import write_tables
from mgvq.cli.sensitivity import main

SMALL = ("calibration.num_images=2", "calibration.heldout_images=1", "--seeds", "2", "--metrics", "uniform,random,wanda,taylor")


def frame() -> pd.DataFrame:
    """Two layers of 4 and 6 channels, three seeds; `flat` knows no ranks, `gone` none in the first layer."""
    random = np.random.default_rng(0)
    rows = [(seed, layer, c) for seed in range(3) for layer, n in (("b", 4), ("a", 6)) for c in range(n)]
    scores = pd.DataFrame(rows, columns=["seed", "layer", "channel"])
    for name in ("one", "other", "gone"):
        scores[name] = random.exponential(size=len(rows))
    scores.loc[scores.layer == "b", "gone"] = 0.0
    return scores.assign(flat=1.0)


def part(scores: pd.DataFrame, seed: int, layer: str, name: str) -> np.ndarray:
    return scores[(scores.seed == seed) & (scores.layer == layer)].sort_values("channel")[name].to_numpy()


def test_layers_are_compared_with_the_mean_channel_of_the_model() -> None:
    scores = frame()
    means = layer_means(scores)
    assert list(means.index) == ["b", "a"]
    assert (means.flat == 1).all()
    for layer in ("a", "b"):
        mine = np.concatenate([part(scores, seed, layer, "one") for seed in range(3)])
        assert means.one[layer] == pytest.approx(mine.mean() / scores.one.mean())


def test_ranks_are_correlated_over_all_channels_below_and_within_layers_above() -> None:
    scores = frame()
    ranks = rank_correlation(scores)
    model = [spearmanr(s.one, s.other).statistic for _, s in scores.groupby("seed")]
    layers = [
        spearmanr(part(scores, seed, layer, "one"), part(scores, seed, layer, "other")).statistic
        for seed in range(3)
        for layer in ("a", "b")
    ]
    gone = [spearmanr(part(scores, seed, "a", "one"), part(scores, seed, "a", "gone")).statistic for seed in range(3)]
    assert ranks.loc["other", "one"] == pytest.approx(np.mean(model))
    assert ranks.loc["one", "other"] == pytest.approx(np.mean(layers))
    assert ranks.loc["one", "gone"] == pytest.approx(np.mean(gone))
    assert ranks.loc["flat"].isna().all()
    assert ranks["flat"].isna().all()
    assert np.diag(ranks)[:3] == pytest.approx(1)


def test_stability_is_kendalls_tau_of_all_pairs_of_seeds() -> None:
    scores = frame()
    table = stability(scores).set_index("definition")
    tau = {
        layer: np.mean(
            [
                kendalltau(part(scores, i, layer, "one"), part(scores, j, layer, "one")).statistic
                for i, j in ((0, 1), (0, 2), (1, 2))
            ]
        )
        for layer in ("a", "b")
    }
    assert table["mean"]["one"] == pytest.approx(np.mean(list(tau.values())))
    assert table.worst["one"] == pytest.approx(min(tau.values()))
    assert table.layer["one"] == min(tau, key=lambda layer: tau[layer])
    assert table.layer["gone"] == "a"
    assert np.isnan(table["mean"]["flat"])


def test_equal_scores_are_equal_tables(tmp_path: Path) -> None:
    written = [write_tables("model", frame(), tmp_path / name) for name in ("first", "second")]
    assert [p.read_bytes() for p in written[0]] == [p.read_bytes() for p in written[1]]
    assert "| flat" in written[0][0].read_text()
    assert "nan" not in "".join(p.read_text() for p in written[0])


@pytest.mark.parametrize("family", sampled(["tiny_internvl", "tiny_qwen2_vl"], 1))
def test_the_command_writes_two_tables_and_two_figures(family: str, tmp_path: Path) -> None:
    done = run_command("mgvq.cli.sensitivity", family, *SMALL, results=tmp_path)
    files = [Path(line) for line in done.stdout.splitlines()[-4:]]
    stem = f"sensitivity_{family}"
    tables, figures = tmp_path / "tables", tmp_path / "figures"
    assert files == [tables / f"{stem}_ranks.md", tables / f"{stem}_stability.md",
                     figures / f"{stem}_layers.png", figures / f"{stem}_ranks.png"]  # fmt: skip
    for file in files[2:]:
        with Image.open(file) as picture:
            assert min(picture.size) > 300
    rows = {
        line.split("|")[1].strip(): line.split("|")[2:] for line in files[1].read_text().splitlines() if line.startswith("| ")
    }
    assert set(rows) == {"definition", "uniform", "random", "wanda", "taylor"}
    assert abs(float(rows["random"][0])) < 0.1
    assert float(rows["wanda"][0]) > 0.5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("tiny_internvl", "--seeds", "1"), "--seeds"),
        (("tiny_internvl", "--metrics", "wanda,luck"), "luck"),
        (("huge",), "huge"),
        (("local",), "model.path"),
        (("tiny_internvl", "calibration.num_pictures=3"), "num_pictures"),
        (("tiny_internvl", "calibration=none"), "calibration=none"),
        (("tiny_internvl", "calibration=hearsay"), "hearsay"),
        (("tiny_internvl", "calibration.num_images=0"), "calibration.num_images"),
        (("tiny_internvl", "seed=3"), "seed=3"),
        (("tiny_internvl", "calibration.seed=0"), "calibration.seed=0 would be the seed of all 3 calibrations"),
        (("tiny_internvl", "calibration.gram_samples=200", "--metrics", "uniform"), "none of uniform reads a Gram"),
    ],
)
def test_bad_settings_end_with_a_paragraph(
    arguments: tuple[str, ...], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mgvq-sensitivity", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert named in capsys.readouterr().err


def test_the_command_is_imported_without_torch() -> None:
    code = "import mgvq.cli.sensitivity, sys; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
