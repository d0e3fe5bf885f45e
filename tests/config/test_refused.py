"""Settings that are bad, or do not fit together, are refused by name before any work."""

import pytest
from composed import composed, identity

from mgvq.errors import UserError
from mgvq.model.sites import TOWERS
from mgvq.runs.build import SCOPES, build, check
from mgvq.runs.identity import run_id
from mgvq.runs.method import build_method


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


def test_the_scopes_that_are_checked_are_those_that_exist() -> None:
    assert tuple(TOWERS) == SCOPES
