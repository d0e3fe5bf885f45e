"""A run of `kmeans` and `rtn` on every shipped model, and of every other preset on one of them in turn: its checkpoint loads in a
fresh process, scores decoded exactly what the run has recorded, and packed gives the same answers but for ties, with a
loss within 1e-4.

Decoded it is loaded by `mgvq.load`, packed by transformers' `from_pretrained`.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
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
CASES = [
    *((preset, model) for preset in ("kmeans", "rtn") for model in MODELS),
    *((preset, MODELS[at % len(MODELS)]) for at, preset in enumerate(PRESETS)),
]
WHOLE, SAMPLE = len(CASES), 0  # `make test` has both ways of loading in tests/e2e/test_checkpoint.py and test_transformers.py
SHORT = ("calibration.num_images=8", "calibration.questions_per_image=4", "calibration.heldout_images=4")
NUM_QUESTIONS = 104
TIES = 0.04  # the share of answers that may be others: two choices of the same logit, whose last digit is another
LOSS = 1e-4
FRESH = """
import json, sys, torch, transformers
import mgvq
from mgvq.evaluation.tiny_vqa import TinyVQA
torch.set_num_threads(1)
folder, number = sys.argv[1], int(sys.argv[2])
task = TinyVQA(num_questions=number, seed=0, answers="forced")
processor = mgvq.load_processor(folder)
found = {}
for name, model in (
    ("decoded", mgvq.load(folder)),
    ("packed", transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)),
):
    result = task(model, None, processor, "")
    found[name] = {"predictions": list(result.samples.prediction), "loss": result.metrics["loss/answer"]}
print(json.dumps(found))
"""


def missing() -> str:
    return ""


def trials(scratch: Path, number: int) -> Iterator[Outcome]:
    """One preset and model each."""
    for preset, model in CASES[:number]:
        with composer() as compose:
            words = [f"method={preset}", f"model={model}", f"paths.results={scratch}", "evaluation.answers=forced"]
            words += [f"evaluation.num_questions={NUM_QUESTIONS}"]
            cfg = compose(*words)
            if "num_images" in cfg.calibration:
                cfg = compose(*words, *SHORT)
        run = RunFolder(scratch / "runs" / run_id(cfg))
        metrics = execute(cfg, run)
        yield judged(f"{preset}", model, run, metrics["loss/answer"], NUM_QUESTIONS)


def judged(preset: str, model: str, run: RunFolder, loss: float, number: int) -> Outcome:
    """What a fresh process finds, held against what the run has recorded."""
    command = [sys.executable, "-c", FRESH, str(run.checkpoint), str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return Outcome(preset, wrong=f"{model}: {done.stderr.strip().splitlines()[-1][:300]}")
    found = json.loads(done.stdout.splitlines()[-1])
    expected = list(pd.read_parquet(run.path / "samples.parquet").prediction)
    wrong = []
    if (found["decoded"]["predictions"], found["decoded"]["loss"]) != (expected, loss):
        wrong.append(f"decoded it has another loss ({found['decoded']['loss']} for {loss}) or other answers")
    others = sum(a != b for a, b in zip(found["packed"]["predictions"], expected, strict=True))
    if others > TIES * number or abs(found["packed"]["loss"] - loss) > LOSS:
        wrong.append(f"packed it has {others} other answers and a loss of {found['packed']['loss']} for {loss}")
    return Outcome(preset, faults=2, survived=2 - len(wrong), wrong=f"{model}: {'; '.join(wrong)}" if wrong else "")
