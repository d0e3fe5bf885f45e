"""The configuration is sound: every variant builds, presets and studies compose, and their stages fit."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from composed import CONF, GROUPS, METHODS, ROOT, VARIANTS, composed, identity

from mgvq.errors import UserError
from mgvq.runs.build import build, check
from mgvq.runs.method import build_method
from mgvq.studies.plan import expand
from mgvq.studies.spec import read_study

# What a variant without a default needs before it can be built.
NEEDS = {
    ("model", "local"): ["model.path=."],
    ("model", "hub"): ["model.path=organisation/name"],
    ("model", "gguf"): ["model.path=model.gguf"],
    ("calibration", "image_text"): ["calibration.path=rows.jsonl"],
    ("calibration", "chat"): ["calibration.path=rows.jsonl"],
    ("calibration", "sharegpt4v"): ["calibration.path=captions.json", "calibration.images=coco"],
    ("calibration", "hub"): [f"calibration.path={ROOT}/tests/data/calibration/hub", "calibration.columns.answer=answer"],
    ("allocation", "transfer"): [f"allocation.source={ROOT / 'tests/config/allocation.parquet'}"],
}
NOT_STAGES = {"model": ("mgvq.model.source", "mgvq.model.gguf", "mgvq.model.grafted")}
HELPERS = {
    "tuning": {"descent"}, "refit": {"by_centroid"},
    "calibration": {"drawn", "examples", "images", "rows"}, "curvature": {"block_statistics", "fusion", "statistics"},
    "sensitivity": {"channels"}, "grouping": {"cut"}, "allocation": {"budget", "floors"},
    "codebook": {"beam", "exponent", "gaussian", "layout", "lloyd", "nearest", "sharing", "source", "tables", "vector"},
    "compensation": {"damping", "direction", "ldl", "ldlq", "tiles", "vectors"},
    "evaluation": {"documents", "forced", "harness", "means", "suite_metrics"},
}  # fmt: skip


@pytest.mark.parametrize(("group", "variant"), VARIANTS)
def test_every_variant_builds_from_its_own_module(group: str, variant: str) -> None:
    cfg = composed(f"{group}={variant}", *NEEDS.get((group, variant), []))
    part = build(cfg, group)
    if variant == "none" and group != "compensation":
        assert part is None
    else:
        assert type(part).__module__ in NOT_STAGES.get(group, (f"mgvq.{group}.{variant}",))


@pytest.mark.parametrize("group", [g for g in GROUPS if g not in NOT_STAGES])
def test_every_module_of_a_stage_has_its_yaml(group: str) -> None:
    modules = {f.stem for f in (ROOT / "mgvq" / group).glob("*.py")} - {"__init__"} - HELPERS.get(group, set())
    nothing = set() if group == "compensation" else {"none"}
    assert modules == {v for g, v in VARIANTS if g == group} - nothing


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_composes_and_is_no_key_of_its_own(method: str) -> None:
    cfg = composed(f"method={method}")
    check(cfg)
    assert "method" not in cfg, "a preset without '@package _global_' on its first line lands under its own name"


@pytest.mark.parametrize("preset", sorted(f.stem for f in (CONF / "experiment").glob("*.yaml")))
@pytest.mark.parametrize("method", ["mgvq", "gptq", "rtn"])
def test_every_experiment_composes_with_any_method(preset: str, method: str) -> None:
    data = ["calibration=none"] if method == "rtn" else ["calibration.path=captions.json", "calibration.images=coco"]
    cfg = composed(
        f"experiment={preset}", "model=qwen2_vl_7b", f"method={method}", "evaluation=tiny_vqa", "~evaluation.tasks", *data
    )
    check(cfg)
    assert build_method(cfg) is not None
    assert (cfg.model.name, cfg.scope) == ("qwen2_vl_7b", "language")
    assert "experiment" not in cfg


def test_the_paper_is_evaluated_on_its_six_tasks() -> None:
    text = (CONF / "experiment" / "paper_table2.yaml").read_text()
    assert yaml.safe_load(text)["evaluation"]["tasks"] == [
        "mmmu_val", "seedbench", "ocrbench", "vizwiz_vqa_val", "scienceqa_img", "textvqa_val"]  # fmt: skip


@pytest.mark.parametrize("study", sorted((ROOT / "experiments").glob("*/study.yaml")), ids=lambda p: p.parent.name)
def test_every_study_expands_and_bears_its_folders_name(study: Path) -> None:
    """Expansion takes seconds: that of a study with a record is tested beside its record (tests/golden), that of the paper's
    models, which are not here, in tests/unit/test_benchmark_study.py."""
    read = read_study(study)
    assert read.name == study.parent.name
    if read.frozen:
        with pytest.raises(UserError, match=f"{read.name} is frozen at {read.frozen}"):
            expand(read)
    elif not (ROOT / "results" / "records" / f"{read.name}.parquet").is_file() and "paper" not in read.name:
        assert expand(read)


def test_command_line_wins_over_preset_wins_over_group() -> None:
    assert composed("codebook=kmeans").codebook.weight_power == 0.0
    assert composed("method=kmeans_ldlq").codebook.weight_power == 0.5
    assert composed("method=kmeans_ldlq", "codebook.weight_power=0.2").codebook.weight_power == 0.2


def test_further_samples_are_taken_where_a_gram_is_read_or_made() -> None:
    """By another stage than the curvature too, and behind a quantised prefix, which makes its own."""
    for settings in (
        ["method=gptq"],
        ["method=guidedquant", "sensitivity=gram_diag"],
        ["method=guidedquant", "prefix=quantized"],
    ):
        assert build_method(composed(*settings, "calibration.gram_samples=200"))


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_is_a_method_whose_stages_fit(method: str) -> None:
    assert (build_method(composed(f"method={method}")) is None) == (method == "full_precision")


def test_no_torch_for_planning() -> None:
    code = "import mgvq, mgvq.cli.run, mgvq.cli.study, mgvq.cli.report, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_shipped_default_is_what_help_shows() -> None:
    done = subprocess.run([sys.executable, "-m", "mgvq.cli.run", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    codebooks = "codebook: additive, columns, grid, kmeans, lattice, none, product, residual, scalar, scaled_grid, trellis"
    for word in (codebooks, "method=kmeans", "bits_per_weight: 2.0"):
        assert word in done.stdout


@pytest.mark.parametrize("model", sorted(f.stem for f in (CONF / "model").glob("tiny_*.yaml")))
def test_every_shipped_model_takes_what_a_local_one_does(model: str) -> None:
    own = identity(f"model={model}")
    for setting in ("model.stress.sigma=0.7", "model.attention=eager"):
        assert identity(f"model={model}", setting) != own


def test_stress_is_nobodys_default() -> None:
    """It is off in the base of all models, and no other names it."""
    settings = {f.stem: yaml.safe_load(f.read_text()) for f in (CONF / "model").glob("*.yaml")}
    naming = {name: chosen["stress"] for name, chosen in settings.items() if "stress" in chosen}
    assert {name: (stress["sigma"], stress["seed"]) for name, stress in naming.items()} == {"local": (None, 0)}
    assert composed().model.stress.sigma is None
