"""Variants in a package that mgvq knows nothing of: one of each group is planned, checked, run, tracked and tabulated."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, run_command
from omegaconf import DictConfig

from mgvq.errors import UserError
from mgvq.runs.build import VARIANTS, build, check
from mgvq.runs.compose import composer
from mgvq.runs.identity import run_id, scientific_settings
from mgvq.runs.method import build_method

GROUPS = [group for group in VARIANTS if group != "model"]
SEARCH = "hydra.searchpath=[pkg://theirs.conf]"
ALL = [f"{group}=theirs" for group in GROUPS]
STUDY = f"""
name: theirs
question: do the variants of others work?
common: ['{SEARCH}', scope=language, budget.bits_per_weight=2.5, {", ".join(ALL)}]
arms: {{two bits: [], three bits: [budget.bits_per_weight=3.5]}}
seeds: [0]
baseline: two bits
primary: {{arm: three bits, metric: loss}}
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the package, outside of the checkout."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(ROOT / "tests" / "data" / "theirs", folder / "theirs")
    return folder


@pytest.fixture(autouse=True)
def found(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importable here and in the commands."""
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))


def composed(*overrides: str) -> DictConfig:
    with composer() as compose:
        return compose(SEARCH, *overrides)


def test_a_run_of_nothing_but_theirs(tmp_path: Path) -> None:
    results, study = tmp_path / "results", tmp_path / "study.yaml"
    study.write_text(STUDY)
    done = run_command("mgvq.cli.study", str(study), results=results)
    assert "8 test riddles" in done.stdout
    assert "difference to two bits, accuracy in points, loss in nats a token" in done.stdout
    assert "1 seed x 2 images" in done.stdout
    runs = sorted(results.glob("runs/*/DONE"))
    assert sorted((results / "names").read_text().split()) == [file.parent.name for file in runs]
    run = runs[0].parent
    identity = json.loads((run / "identity.json").read_text())
    assert all(identity[group]["variant"].startswith("theirs.variants.") for group in GROUPS if group in identity)
    assert {"theirs:rounded", "theirs:tuned"} <= set(json.loads((run / "metrics.json").read_text())["flags"])
    assert "refit" in set(pd.read_parquet(run / "proxy.parquet").part)
    line = run_command("mgvq.cli.study", str(study), "--dry", results=results).stdout.splitlines()[-1]
    again = run_command("mgvq.cli.run", *line.split()[2:], results=results)
    assert again.stdout.startswith("done before")
    assert again.stdout.splitlines()[-1] == line.split()[1]


def names(*folders: Path) -> dict[str, str]:
    """The names of all their variants, as another process tells them, which finds the package in the first of the folders."""
    code = f"from mgvq.runs.compose import composer\nwith composer() as c: print(dict(c(*{[SEARCH, *ALL]}).variants))"
    path = os.pathsep.join(map(str, (*folders, ROOT)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout)


def test_their_variants_count_by_path_and_by_the_code_or_version_of_their_package(package: Path, tmp_path: Path) -> None:
    here = {group: composed(f"{group}=theirs").variants[group] for group in GROUPS}
    mark = here["grouping"].partition("(")[2]
    assert here["grouping"] == f"theirs.variants.Halves ({mark}"
    assert all(name.startswith("theirs.variants.") and name.endswith(mark) for name in here.values())
    assert {group: name for group, name in names(package).items() if group != "model"} == here
    edited = Path(shutil.copytree(package, tmp_path / "edited"))
    with (edited / "theirs" / "variants.py").open("a") as file:
        file.write("# another version\n")
    assert not names(edited)["grouping"].endswith(mark)
    info = edited / "theirs_for_mgvq-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs-for-mgvq\nVersion: 1.2\n")
    (info / "top_level.txt").write_text("theirs\n")
    assert names(edited)["grouping"] == "theirs.variants.Halves (theirs-for-mgvq 1.2)"


def test_a_variant_is_another_run_but_for_a_tracker() -> None:
    base = run_id(composed())
    assert run_id(composed("tracker=theirs")) == base
    for group in ("evaluation", "codebook"):
        cfg = composed(f"{group}=theirs")
        assert scientific_settings(cfg)[group]["variant"] == cfg.variants[group]
        assert run_id(cfg) != base


def test_what_their_yamls_declare_counts_as_declared() -> None:
    base = run_id(composed("sensitivity=theirs", "calibration=theirs"))
    assert run_id(composed("sensitivity=theirs", "calibration=theirs", "calibration.file=/elsewhere/SOME.TXT")) == base
    assert run_id(composed("sensitivity=theirs", "calibration=theirs", "calibration.file=Other.txt")) != base
    assert "slope" not in scientific_settings(composed("sensitivity=theirs"))["sensitivity"]
    assert scientific_settings(composed("sensitivity=theirs", "sensitivity.slope=0.2"))["sensitivity"]["slope"] == 0.2


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["sensitivity=theirs"], "sensitivity has no effect"),
        (["sensitivity=theirs", "allocation=theirs"], "sensitivity has no effect"),
        (["sensitivity=theirs", "grouping=theirs"], None),
        (["sensitivity=wanda", "grouping=theirs", "calibration=theirs"], None),
        (["codebook=theirs"], None),
        (["codebook=theirs", "curvature=theirs", "calibration=theirs"], "curvature has no effect"),
        (["codebook=theirs", "calibration=theirs"], "calibration has no effect"),
        (["codebook=theirs", "refit=theirs"], "refit weigh errors by the curvature"),
        (["codebook=theirs", "refit=theirs", "curvature=theirs"], "curvature reads statistics"),
        (["codebook=theirs", "refit=theirs", "curvature=theirs", "calibration=theirs"], None),
        (["codebook=grid", "refit=theirs", "curvature=theirs", "calibration=theirs"], "refit has no effect"),
        (["codebook=theirs", "refit=closed_form", "curvature=theirs", "calibration=theirs"], None),
        (["compensation=theirs"], "compensation weigh errors by the curvature"),
        (["compensation=theirs", "curvature=input", "calibration=theirs"], "this curvature has no metric"),
        (["compensation=theirs", "curvature=theirs", "calibration=theirs"], None),
        (["compensation=hessian_two_sided", "curvature=theirs", "calibration=theirs"], None),
        (["method=mbq", "calibration=theirs"], None),
        (["method=mbq", "calibration=theirs", "calibration.blind=true"], "curvature as set here tells images from text"),
        (["method=mgvq", "sensitivity=theirs", "calibration=text"], "sensitivity as set here"),
        (["method=full_precision", "evaluation=theirs"], None),
        (["method=full_precision", "sensitivity=theirs", "compensation=theirs"], "sensitivity and compensation would have no"),
    ],
)
def test_their_variants_are_checked_as_ours_are(overrides: list[str], named: str | None) -> None:
    def checked() -> None:
        cfg = composed(*overrides)
        check(cfg)
        build_method(cfg)

    if named is None:
        checked()
    else:
        with pytest.raises(UserError, match=named):
            checked()


@pytest.mark.parametrize(
    ("group", "forgotten"),
    [
        ("sensitivity", "needs_images"), ("grouping", "uses_score"), ("allocation", "distortion"), ("codebook", "spans_rows"),
        ("curvature", "has_output_factor"), ("compensation", "shift"), ("refit", "__call__"), ("calibration", "draw"),
        ("evaluation", "shows_images"), ("tracker", "place"),
    ],
)  # fmt: skip
def test_what_a_variant_forgot_to_declare_is_named(group: str, forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = composed(f"{group}=theirs")
    kind = type(build(cfg, group))
    monkeypatch.delattr(kind, forgotten)
    with pytest.raises(UserError, match=rf"{group}: theirs\.variants\.{kind.__name__} has no {forgotten}; the protocol mgvq\."):
        build(cfg, group)


def test_planning_imports_nothing_of_theirs_but_the_rules() -> None:
    code = f"""
import sys
from mgvq.runs.build import check
from mgvq.runs.compose import composer
from mgvq.runs.identity import run_id
with composer() as compose:
    cfg = compose(*{[SEARCH, *ALL]})
check(cfg)
run_id(cfg)
sys.exit('torch' in sys.modules or 'theirs.variants' in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
