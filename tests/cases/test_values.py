"""Bad values are refused before torch is imported, in the very words of the classes that check them. A new input is a line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, sampled
from omegaconf import OmegaConf
from variants import ALWAYS, CONF, variants

from mgvq.runs.build import VARIANTS

# Words of `mgvq-run`, and what is said of them.
VALUES = {
    "budget.bits_per_weight=0": "is no bit width",
    "budget.bits_per_weight=nan": "is no bit width",
    "budget.bits_per_weight=many": "is no bit width",
    "budget.bits_per_weight=0.1": "is below the smallest rate of this codebook: 2x2 takes 0.5 index bits a weight",
    "method=rtn budget.bits_per_weight=0.7": "is below the smallest rate of this codebook: int1",
    "method=kmeans_ldlq scope=all codebook.table=fp8": "codebook.table must be fp16 or int8, got 'fp8'",
    "codebook.vector_length=0": "codebook.vector_length must be a whole number of 1 to 16",
    "codebook.iterations=2.5": "codebook.iterations must be a whole number >= 1",
    "codebook.weight_power=nan": "codebook.weight_power must lie in [0, 1], got nan",
    "codebook.weight_power=.nan": "codebook.weight_power must be a number, got '.nan'",
    "codebook.weight_power=1": "codebook weigh errors by the curvature, but curvature=none",
    "allocation.tolerance=2": "allocation.tolerance must lie in [0, 0.5]",
    "allocation=exact allocation.gap=1 grouping=score": "allocation.gap must lie in [0, 1)",
    "allocation=transfer grouping=score allocation.source=none.parquet": "none.parquet",
    "method=mgvq compensation.steps=[0.1,0.1]": "compensation.steps",
    "method=mgvq compensation.steps=[0.0]": "compensation.steps",
    "method=mgvq calibration.heldout_images=0": "calibration.heldout_images",
    "method=gptq compensation.damping=0": "compensation.damping must lie in (0, 1]",
    "method=mgvq calibration=none": "reads statistics of the activations: add a calibration set",
    "calibration=tiny_vqa": "calibration has no effect",
    "sensitivity=obs": "sensitivity has no effect",
    "curvature=kronecker": "curvature has no effect",
    "method=rtn refit=closed_form curvature=input calibration=tiny_vqa": "refit has no effect",
    "method=gptq calibration.num_images=0": "calibration.num_images must be a whole number",
    "method=gptq calibration=text calibration.num_samples=-3": "calibration.num_samples must be a whole number",
    "method=gptq calibration.gram_samples=127": "calibration.gram_samples must be a whole number >= 128, got 127",
    "method=gptq calibration.gram_samples=many": "calibration.gram_samples must be a whole number >= 128, got 'many'",
    "method=gptq calibration.gram_samples=999999": "calibration asks 8,000,248 questions (gram_samples and heldout_images",
    "method=gptq calibration=text calibration.gram_samples=8": "calibration.gram_samples must be a whole number >= 64, got 8",
    "method=guidedquant calibration.gram_samples=256": "calibration.gram_samples=256 has no effect: curvature as set here",
    "method=gptq curvature.clip=0": "curvature.clip must be a number > 0",
    "method=gptq curvature.clip=much": "curvature.clip must be a number > 0",
    "method=gptq curvature.clip=true": "curvature.clip must be a number > 0",
    "curvature=kronecker curvature.fusion=token curvature.clip=4": "curvature.clip=4 has no effect with curvature.fusion=token",
    "method=gptq prefix=quantized curvature.clip=4": "curvature.clip=4 would not reach what layers are rounded by",
    "method=mbq calibration=text": "tells images from text, and calibration=text shows no image",
    "evaluation.num_questions=0": "evaluation.num_questions must be a whole number",
    "evaluation.num_questions=999999999": "evaluation.num_questions must be a whole number",
    "evaluation.answers=guessed": "evaluation.answers must be generated or forced",
    "evaluation=perplexity evaluation.num_passages=0": "evaluation.num_passages must be a whole number",
    "evaluation=suite evaluation.tasks=[mmmu]": "evaluation.tasks, evaluation.max_new_tokens: no mmmu here",
    "evaluation=suite evaluation.tasks=[]": "evaluation.tasks must name",
    "evaluation=suite evaluation.seed=3": "evaluation.seed=3 draws the questions of evaluation.limit",
    "model.dtype=fp8": "model.dtype must be float32, bfloat16 or float16, got 'fp8'",
    "model.attention=flash": "model.attention must be null or one of",
    "model.chat_template=none.jinja": "model.chat_template=none.jinja is not a file",
    "model.family=3": "model.family must be a mapping, got 3",
    "model.stress.sigma=-1": "model.stress.sigma",
    "tracker=wandb tracker.mode=never": "tracker.mode must be one of",
    "seed=0.5": "seed must be a whole number",
    "threads=0": "threads must be a whole number",
    "tf32=maybe": "tf32 must be true or false",
    "device=tpu": "device must be auto, cpu, cuda or cuda:N",
    "scope=some": "scope must be one of",
}

# Budgets at the very edge, and what ships.
FINE = [
    "budget.bits_per_weight=0.5 codebook.vector_length=2",
    "budget.bits_per_weight=0.4 allocation.tolerance=0.3",
    *(f"method={name}" for name in ("full_precision", "rtn", "vptq", "mgvq")),  # tests/config composes and builds all of them
]

# Each runs in a process of its own.
_RUNS = """
import json, sys
from mgvq.runs.build import check
from mgvq.runs.compose import composer
from mgvq.runs.early import check_values
told = {}
with composer() as compose:
    for words in json.load(sys.stdin):
        try:
            cfg = compose(*words.split())
            check(cfg)
            check_values(cfg)
        except Exception as error:
            told[words] = f"{type(error).__name__}: {error}"
        assert "torch" not in sys.modules
json.dump(told, sys.stdout)
"""
_COMMAND = """
import json, sys
from mgvq.cli import run
sys.argv = ["mgvq-run", *json.load(sys.stdin)]
try:
    run.main()
except SystemExit as exited:
    json.dump([exited.code, "torch" in sys.modules], sys.stdout)
"""


def in_a_process(code: str, given: Any, folder: Path) -> Any:
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(given), capture_output=True, text=True, cwd=folder,
                          env={"PATH": "", "PYTHONPATH": str(ROOT), "MGVQ_RESULTS": str(folder)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return in_a_process(_RUNS, [*VALUES, *FINE], tmp_path_factory.mktemp("results"))


@pytest.mark.parametrize("words", VALUES)
def test_a_bad_value_is_refused_before_torch_is_imported(words: str, told: dict[str, str]) -> None:
    assert told[words].startswith("UserError: ")
    assert VALUES[words] in told[words]


@pytest.mark.parametrize("words", FINE)
def test_a_good_value_passes(words: str, told: dict[str, str]) -> None:
    assert words not in told


def test_the_command_ends_without_torch(tmp_path: Path) -> None:
    assert in_a_process(_COMMAND, ["method=kmeans", "budget.bits_per_weight=0.1"], tmp_path) == [2, False]


# What every field of every variant is set to in turn.
PROBES: tuple[Any, ...] = (None, "foo", -1, 0, 17, float("nan"), [])
_GROUPS = """
import json, sys
from omegaconf import OmegaConf
from mgvq.errors import UserError
from mgvq.runs.build import build
from mgvq.runs.early import check_group

def said(function, group, settings):
    try:
        function(OmegaConf.create({"seed": 0, group: settings}), group)
    except UserError as error:
        return str(error)

cases = json.load(sys.stdin)
early = [said(check_group, *case) for case in cases]
assert "torch" not in sys.modules
json.dump([early, [said(build, *case) for case in cases]], sys.stdout)
"""


PROBED = [(group, name) for group in VARIANTS for name in (variants(group) if group != "model" else ["local"])]  # all of one kind


def probed(group: str, name: str) -> list[tuple[str, dict[str, Any]]]:
    """The variant as it stands in `conf/`, and with every setting of its own set to every probe."""
    own = OmegaConf.merge(OmegaConf.load(CONF / group / f"{name}.yaml"),
                          OmegaConf.from_dotlist([*ALWAYS.get(group, {}).get(name, ())]))  # fmt: skip
    plain: Any = {k: v for k, v in OmegaConf.to_container(own).items() if k not in ("defaults", "_declares_")}  # type: ignore[union-attr]
    plain = {k: "x" if isinstance(v, str) and ("???" in v or "${" in v) else v for k, v in plain.items()}
    if "seed" in plain:
        plain["seed"] = 0
    return [(group, plain), *((group, {**plain, key: probe}) for key in plain if key != "_target_" for probe in PROBES)]


SAMPLE = [param.values for param in sampled(PROBED, 16) if not param.marks]


@pytest.mark.parametrize(
    "chosen", [SAMPLE, pytest.param([v for v in PROBED if v not in SAMPLE], marks=pytest.mark.trust)], ids=["sample", "others"]
)
def test_what_is_said_early_is_what_would_be_said_later(chosen: list[tuple[str, str]], tmp_path: Path) -> None:
    """No check is lost or made up where modules are executed without their libraries."""
    cases = [case for variant in chosen for case in probed(*variant)]
    early, later = in_a_process(_GROUPS, cases, tmp_path)
    assert sum(text is not None for text in early) > 40
    for case, first, second in zip(cases, early, later, strict=True):
        if "cannot be built" not in (second or ""):  # a class that fails otherwise, of which only Hydra speaks
            assert first == second, case
