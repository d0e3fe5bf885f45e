"""The configuration is sound: every variant builds, presets compose, and runs are named by what moves their numbers."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from mgvq.errors import UserError
from mgvq.model.sites import TOWERS
from mgvq.model.source import folder_digest
from mgvq.runs.build import SCOPES, STAGES, build, check
from mgvq.runs.compose import composer
from mgvq.runs.device import device_type
from mgvq.runs.identity import run_id, run_ids, scientific_settings
from mgvq.runs.method import build_method
from mgvq.runs.places import conf_folder
from mgvq.studies.plan import expand
from mgvq.studies.spec import read_study

CONF = conf_folder()
ROOT = Path(__file__).parents[2]
GROUPS = ("model", "calibration", *STAGES, "evaluation", "tracker")
VARIANTS = [(g, f.stem) for g in GROUPS for f in sorted((CONF / g).glob("*.yaml"))]
METHODS = sorted(f.stem for f in (CONF / "method").glob("*.yaml"))
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


def composed(*overrides: str) -> DictConfig:
    with composer() as compose:
        return compose(*overrides)


def identity(*overrides: str) -> str:
    cfg = composed(*overrides)
    check(cfg)
    return run_id(cfg)


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


@pytest.mark.parametrize("method", ["rtn", "kmeans", "mgvq", "mgvq2"])
def test_the_names_at_several_seeds_are_those_at_each(method: str) -> None:
    """Those behind the second are not worked out; where a setting knows more of the seed than its number, they are."""
    seeds = [3, 0, 7, 10**9]
    cfg = composed(f"method={method}")
    assert run_ids(cfg, seeds) == [run_id(composed(f"method={method}", f"seed={seed}")) for seed in seeds]
    OmegaConf.update(cfg, "evaluation.num_questions", "1${seed}")
    worked_out = []
    for seed in seeds:
        cfg.seed = seed
        worked_out.append(run_id(cfg))
    assert run_ids(cfg, seeds) == worked_out


def test_code_may_move_without_another_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant counts by its name: the path of its class only where it is set in another way."""
    before = identity("method=kmeans")
    moved = "mgvq.codebook.moved.KMeans"
    inline = identity("method=kmeans", f"codebook._target_={moved}")
    assert inline != before
    yamls = {name: target.replace("kmeans.KMeans", "moved.KMeans") for name, target in own_targets().items()}
    monkeypatch.setattr("mgvq.runs.compose._own_target", lambda group, choice: yamls.get((group, choice)))
    assert identity("method=kmeans", f"codebook._target_={moved}") == before


def own_targets() -> dict[tuple[str, str], str]:
    """What every variant builds, by group and name."""
    found = {(g, v): yaml.safe_load((CONF / g / f"{v}.yaml").read_text()).get("_target_") for g, v in VARIANTS}
    return {key: target for key, target in found.items() if target}


def test_identity_is_rebuilt_from_the_config_of_a_run(tmp_path: Path) -> None:
    """From `config.yaml` alone, whatever today's yamls say."""
    cfg = composed("method=mgvq", "model=tiny_llava_onevision", "allocation=uniform")
    kept = tmp_path / "config.yaml"
    OmegaConf.save(cfg, kept, resolve=True)
    assert scientific_settings(OmegaConf.load(kept)) == scientific_settings(cfg)  # type: ignore[arg-type]


def test_what_does_nothing_or_came_later_does_not_count() -> None:
    settings = scientific_settings(composed("method=kmeans"))
    assert set(settings) == {
        "model", "allocation", "codebook", "evaluation", "budget", "scope", "threads", "device", "tf32", "numerics"
    }  # fmt: skip
    assert "_declares_" not in str(settings)
    later = "++codebook._declares_.identity.table.neutral=fp16"
    assert identity("method=kmeans", later) != identity("method=kmeans")
    assert identity("method=kmeans", later, "codebook.table=int8") == identity("method=kmeans", "codebook.table=int8")


def test_a_variant_whose_code_has_moved_numbers_names_its_own_runs_anew() -> None:
    moved = "++codebook._declares_.numerics=1"
    assert identity("method=kmeans", moved) != identity("method=kmeans")
    assert identity("method=kmeans", moved) != identity("method=kmeans", "++codebook._declares_.numerics=2")
    assert scientific_settings(composed("method=mgvq"))["refit"]["numerics"] == 2.0


def test_settings_outside_of_the_groups_that_came_later_count_off_their_neutral_values() -> None:
    for name, neutral, other in (("outliers", 0, 4), ("embedding_bits", "null", 8)):
        for method in ("kmeans", "mgvq"):
            assert identity(f"method={method}", f"{name}={neutral}") == identity(f"method={method}")
            assert identity(f"method={method}", f"{name}={other}") != identity(f"method={method}")
    assert identity("method=full_precision", "embedding_bits=4") != identity("method=full_precision")


@pytest.mark.parametrize("words", ["curvature.clip=4.0", "calibration.gram_samples=200"])
@pytest.mark.parametrize("method", ["kmeans_ldlq", "mgvq"])
def test_clipping_and_further_samples_count_off_null(method: str, words: str) -> None:
    settings = scientific_settings(composed(f"method={method}"))
    group, _, name = words.partition("=")[0].partition(".")
    assert name not in settings[group]
    assert scientific_settings(composed(f"method={method}", words))[group][name]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("method=kmeans", "outliers=-1"), "outliers must be a whole number >= 0"),
        (("method=kmeans", "outliers=0.5"), "outliers must be a whole number >= 0"),
        (("method=full_precision", "outliers=4"), "outliers=4 would have no effect"),
        (("method=kmeans", "embedding_bits=2"), "embedding_bits must be 8, 4 or null"),
        (("method=kmeans", "embedding_bits=true"), "embedding_bits must be 8, 4 or null"),
    ],
)
def test_numbers_of_outliers_and_embedding_bits_are_checked(settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(composed(*settings))


@pytest.mark.parametrize("rule", ["sometimes", "no.such.function", "{about: nothing}"])
def test_a_rule_that_is_none_is_refused(rule: str) -> None:
    with pytest.raises(UserError, match="identity"):
        identity("method=kmeans", f"++codebook._declares_.identity.table={rule}")


def test_the_kind_of_device_and_its_arithmetic_count(monkeypatch: pytest.MonkeyPatch) -> None:
    here = identity("method=kmeans")
    for there, other in ((True, "device=cpu"), (False, "device=cuda")):
        monkeypatch.setattr("mgvq.runs.device._has_cuda", lambda there=there: there)
        chosen = identity("method=kmeans")
        assert chosen == identity("method=kmeans", f"device={'cuda' if there else 'cpu'}")
        assert chosen != identity("method=kmeans", other)
    assert here in (chosen, identity("method=kmeans", "device=cuda"))
    assert identity("method=kmeans", "device=cuda") == identity("method=kmeans", "device=cuda:1")
    assert identity("method=kmeans", "device=cuda") != identity("method=kmeans", "device=cuda", "tf32=true")


def test_what_auto_means_is_what_torch_would_say() -> None:
    import torch

    assert device_type("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_model_folder_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    read: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr("mgvq.digest.hashlib.file_digest", lambda stream, name: read.append(stream.name) or digest(stream, name))
    first = folder_digest(tmp_path)
    assert folder_digest(tmp_path) == first
    assert len(read) == 2
    (tmp_path / "model.safetensors").write_bytes(b"others!")  # as long as before
    assert folder_digest(tmp_path) != first
    assert len(read) == 3


def test_identity_follows_what_moves_numbers() -> None:
    base = identity("method=kmeans")
    assert base == identity("method=kmeans", "budget.bits_per_weight=2")
    assert base == identity("method=kmeans", "tracker=csv", "paths.results=/elsewhere")
    changed = ["seed=1", "evaluation.seed=1", "budget.bits_per_weight=3", "scope=language", "model=tiny_llava_onevision",
               "codebook.vector_length=4", "evaluation.answers=forced", "model.dtype=bfloat16", "numerics=9",
               "threads=2", "model.stress.sigma=0.7", "model.stress.sigma=0.8", "model.attention=eager",
               "+model.processor.do_resize=false"]  # fmt: skip
    assert len({base, *(identity("method=kmeans", c) for c in changed)}) == len(changed) + 1


def test_edited_calibration_data_is_another_run(tmp_path: Path) -> None:
    rows, image = tmp_path / "rows.jsonl", tmp_path / "a.png"
    rows.write_text('{"image": "a.png", "question": "q", "answer": "a"}\n')
    ids = []
    for content in (b"one", b"two"):
        image.write_bytes(content)
        data = ("calibration=image_text", f"calibration.path={rows}", "curvature=input", "codebook.weight_power=0.5")
        ids.append(identity(*data))
    assert ids[0] != ids[1]


def test_the_images_of_a_conversation_and_the_files_of_a_folder_count_and_where_published_images_lie_does_not(
    tmp_path: Path,
) -> None:
    needs = ("curvature=input", "codebook.weight_power=0.5")
    data = shutil.copytree(ROOT / "tests/data/calibration", tmp_path / "data")
    chat = (*needs, "calibration=chat", f"calibration.path={data}/chat.jsonl")
    hub = (*needs, "calibration=hub", f"calibration.path={data}/hub", "calibration.columns.answer=label")
    captions = (*needs, "calibration=sharegpt4v", f"calibration.path={data}/sharegpt4v.json", "calibration.images=/anywhere")
    before = [identity(*settings) for settings in (chat, hub, captions)]
    assert identity(*captions[:-1], "calibration.images=/elsewhere") == before[2]
    for number in (1, 4):  # named by a part of a message, and by the row
        (data / f"coco/train2017/{number:012d}.jpg").write_bytes(b"another")
        assert identity(*chat) not in before
        before.append(identity(*chat))
    (data / "hub/0.jpg").write_bytes(b"another")
    assert identity(*hub) not in before
    assert identity(*hub[:-2], "calibration.path=org/name", hub[-1]) != identity(*hub[:-2], "calibration.path=org/other", hub[-1])
    assert identity(*captions) == before[2]


def test_a_suite_is_named_by_the_tasks_that_it_asks(tmp_path: Path) -> None:
    two = ("evaluation=suite", "evaluation.tasks=[mmstar,ocrbench]")
    assert identity(*two) == identity(*two, "evaluation.max_new_tokens.mmmu_val=7")
    changed = ["evaluation.tasks=[mmstar]", "evaluation.max_new_tokens.mmstar=7", "evaluation.limit=9", "evaluation.batch_size=1"]
    assert len({identity(*two), *(identity(*two, c) for c in changed)}) == len(changed) + 1
    ids = []
    for place, content in (("a", b"rows"), ("b", b"rows"), ("c", b"more rows")):
        file = tmp_path / place / "Lin-Chen/MMStar/val.parquet"
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        ids.append(identity(*two, f"evaluation.data={tmp_path / place}"))
    assert ids[0] == ids[1] != ids[2]


def test_without_a_codebook_every_scope_is_one_run() -> None:
    assert identity("method=full_precision", "scope=all") == identity("method=full_precision", "scope=language")


@pytest.mark.parametrize("method", ["rtn", "full_precision"])
def test_where_nothing_is_random_all_seeds_are_one_run(method: str) -> None:
    assert identity(f"method={method}", "seed=0") == identity(f"method={method}", "seed=5")


def test_other_weights_in_the_same_folder_are_another_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"first")
    first = identity("model=local", f"model.path={tmp_path}")
    (tmp_path / "model.safetensors").write_bytes(b"second")
    assert identity("model=local", f"model.path={tmp_path}") != first


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["budget.bits_per_weight=0"], "budget.bits_per_weight=0"),
        (["budget.bits_per_weight=9"], "budget.bits_per_weight=9"),
        (["budget.bits_per_weight=two"], "budget.bits_per_weight=two"),
        (["method=full_precision", "budget.bits_per_weight=2"], "no effect"),
        (["method=full_precision", "calibration=tiny_vqa"], "calibration would have no effect"),
        (["method=full_precision", "compensation=hessian"], "compensation would have no effect"),
        (["method=full_precision", "sensitivity=wanda", "grouping=score"], "sensitivity and grouping would have no effect"),
        (["allocation=none"], "allocation=uniform"),
        (["model=local"], "model.path"),
        (["scope=everything"], "scope"),
        (["seed=abc"], "seed"),
        (["threads=0"], "threads"),
        (["device=gpu"], "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["device=cpu", "tf32=true"], "tf32=true has no effect on device=cpu"),
        (["tf32=maybe"], "tf32"),
        (["+speling=1"], "speling"),
    ],
)
def test_bad_combinations_are_refused_before_any_work(overrides: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        check(composed(*overrides))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["calibration=tiny_vqa"], "calibration has no effect"),
        (["calibration=tiny_vqa", "curvature=input"], "curvature has no effect"),
        (["codebook.weight_power=0.5"], "curvature=input"),
        (["compensation=hessian"], "compensation weigh errors by the curvature"),
        (["calibration=tiny_vqa", "sensitivity=wanda"], "sensitivity has no effect"),
        (["sensitivity=wanda", "grouping=score"], "sensitivity reads statistics"),
        (["sensitivity=weight_norm", "grouping=modality"], "sensitivity has no effect"),
        (["grouping=modality"], "grouping reads statistics"),
        (["method=kmeans_ldlq", "calibration=none"], "curvature reads statistics"),
        (["method=gptq", "compensation=hessian_two_sided"], "this curvature has no metric: choose curvature=kronecker"),
        (["method=gptq", "refit=closed_form"], "refit has no effect"),
        (["method=mbq", "calibration=text"], "curvature as set here tells images from text"),
        (["method=mbq", "calibration.shown=text"], "calibration=tiny_vqa shows no image"),
        (["method=mgvq", "sensitivity.modality=image", "calibration=text"], "sensitivity as set here"),
        (["method=mgvq", "grouping=modality", "calibration=text"], "grouping as set here"),
        (
            ["method=guidedquant", "calibration.gram_samples=200"],
            "gram_samples=200 has no effect: curvature as set here reads no plain",
        ),
        (["method=kmeans_ldlq", "prefix=quantized", "curvature.clip=4.0"], "curvature.clip=4 would not reach what"),
    ],
)
def test_stages_that_do_not_fit_together_are_refused(overrides: list[str], named: str) -> None:
    cfg = composed(*overrides)
    check(cfg)
    with pytest.raises(UserError, match=named):
        build_method(cfg)


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


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model=local", "model.path=/no/such/folder"], "/no/such/folder"),
        (["model=local", "model.path=org/name"], "40 hex digits"),
        (["model=hub", "model.path=org/name"], r"hf download org/name --revision main\n  size unknown"),
        (["model=qwen2_vl_2b"], r"hf download Qwen/Qwen2-VL-2B-Instruct --revision main\n  about 4\.4 GB"),
        (["model=local", "model.path=tests"], "holds no model"),
    ],
)
def test_a_model_that_is_not_there_is_named(overrides: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        run_id(composed(*overrides))


@pytest.mark.parametrize(
    ("group", "override"),
    [
        ("codebook", "codebook.vector_length=0"),
        ("codebook", "codebook.iterations=0"),
        ("codebook", "codebook.share=all"),
        ("codebook", "codebook.weight_power=2.0"),
        ("codebook", "codebook.sample=-1"),
        ("allocation", "allocation.tolerance=1.0"),
        ("evaluation", "evaluation.num_questions=0"),
        ("evaluation", "evaluation.answers=guessed"),
        ("model", "model.dtype=int8"),
        ("model", "model.attention=flash_attention_2"),
        ("model", "model.chat_template=no.jinja"),
        ("model", "model.stress.sigma=0.01"),
        ("model", "model.stress.seed=1"),
    ],
)
def test_a_component_names_its_bad_setting(group: str, override: str) -> None:
    with pytest.raises(UserError, match=override.split("=")[0].replace(".", r"\.")):
        build(composed(override), group)


@pytest.mark.parametrize(
    "override",
    ["evaluation.tasks=[]", "evaluation.tasks=[mme]", "evaluation.tasks=[mmstar,mmstar]", "evaluation.max_new_tokens.mmstar=0",
     "evaluation.limit=0", "evaluation.seed=1", "evaluation.batch_size=0"],
)  # fmt: skip
def test_a_suite_names_its_bad_setting(override: str) -> None:
    with pytest.raises(UserError, match=override.split("=")[0].replace(".", r"\.")):
        build(composed("evaluation=suite", override), "evaluation")


def test_the_scopes_that_are_checked_are_those_that_exist() -> None:
    assert tuple(TOWERS) == SCOPES


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
