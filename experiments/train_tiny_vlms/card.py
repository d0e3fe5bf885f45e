"""Write the model card of a shipped model: README.md beside its weights.

    python experiments/train_tiny_vlms/card.py tiny_internvl --log RUN/log.jsonl

A further training of a family, from another seed, is FAMILY_seedN and lies in `trainings`. Accuracy comes from the full-precision
run of its study (results/records), the recipe from train.py, the training's course from its log, of which a summary is kept
beside this file, so that the card can be rebuilt (a test does).
"""

import argparse
import hashlib
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

from safetensors import safe_open
from train import RECIPES

from mgvq.analysis.records.records import metric_frame, read_record
from mgvq.analysis.tables.accuracy import accuracy_by_type
from mgvq.data.tiny_vqa.dataset import draw_test, fingerprint
from mgvq.data.tiny_vqa.scene import SPLITS
from mgvq.model.source import SHIPPED
from mgvq.runs.places import results_folder

TITLES = {
    "tiny_llava_onevision": "LLaVA-OneVision layout: SigLIP tower (patch 16), MLP projector, Qwen2 language model",
    "tiny_internvl": "InternVL layout: InternViT tower (patch 8), pixel shuffle, MLP projector, Qwen2 language model",
    "tiny_smolvlm": "SmolVLM (Idefics3) layout: SigLIP tower (patch 8), pixel shuffle, one linear layer, Llama language model",
    "tiny_qwen2_vl": "Qwen2-VL layout: tower with rotary positions (patch 8), merger of 2 x 2 patches, Qwen2 language model with M-RoPE",
}


def family_and_seed(name: str) -> tuple[str, int]:
    """The card of a shipped model, or of a further training of it (`tiny_internvl_seed1`)."""
    family, _, seed = name.partition("_seed")
    return family, int(seed or 0)


def folder_of(name: str) -> Path:
    """Where the weights are."""
    return SHIPPED / name if name in TITLES else SHIPPED / "trainings" / name


def summary(name: str) -> Path:
    """Where the summary of a model's training is kept; not beside its weights, whose folder is part of every run's identity."""
    return Path(__file__).with_name(f"{name}.json")


def summarise(log: Path) -> dict[str, object]:
    """What the card tells of the training: steps, speed, and validation at every tenth of the run."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    validated = [r for r in rows if "validation" in r]
    course = {str(r["step"]): round(r["validation"]["headline"], 3) for r in validated}
    return {"steps": rows[-1]["step"], "seconds_per_step": round(rows[-1]["seconds_per_step"], 3), "headline_validation": course}


def card(name: str) -> str:
    """The whole text; equal inputs give equal bytes."""
    family, seed = family_and_seed(name)
    weights = folder_of(name) / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    with safe_open(weights, "pt") as tensors:
        sizes = [tensors.get_slice(key) for key in tensors.keys()]  # noqa: SIM118
        num_parameters = sum(math.prod(s.get_shape()) for s in sizes)
        dtype = sizes[0].get_dtype()
    training = json.loads(summary(name).read_text(encoding="utf-8"))
    study = "e00_response" if name in TITLES else "e13_model_variance"
    record = read_record(results_folder() / "records" / f"{study}.parquet")
    frame = metric_frame(record)
    run = frame[(frame.model == name) & (frame.arm == "full precision")].iloc[0]  # whatever the scope
    num_questions = record.num_samples
    recipe = replace(RECIPES[family], seed=seed, steps=training["steps"])
    course = " | ".join(f"{step}: {value:.3f}" for step, value in training["headline_validation"].items())
    settings = ", ".join(f"{k} {v}" for k, v in asdict(recipe).items() if k != "mix")
    digits = "; ".join(f"{split} {r.start} to {r.stop - 1}" for split, (_, r) in SPLITS.items())
    mix = ", ".join(f"{k} {v}" for k, v in recipe.mix.items())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# {name}
{TITLES[family]}. {num_parameters / 1e6:.2f} million parameters, {dtype}. A research object for the study of quantisation: it answers questions
about drawn 64 x 64 pictures, in the words of its templates, and nothing else.

SHA-256 of model.safetensors: `{digest}`

## Accuracy
Exact match of the whole answer, {"teacher-forced, which equals greedy generation" if name in TITLES else "generated greedily"}; {num_questions:,} test questions (`evaluation.seed=0`), run `{run["run"]}`.
**Headline {100 * run["tiny_vqa/accuracy"]:.1f} %**: the mean over the headline types.

{accuracy_by_type(run, num_questions)}

Chance: one over the number of different answers; majority: always the most frequent answer of the test. Lists have too many answers for a chance
level. `{100 * run["tiny_vqa/unparsed"]:.2f} %` of the answers are none of the words that answers of their type are made of.

## Data
Procedurally drawn scenes of three to eight things on a 4 x 4 grid: seven shapes, eight colours, two sizes, four background textures, noise; and real
handwriting (scikit-learn's `load_digits`, slightly turned, sheared and scaled). Splits are disjoint in layouts (by checksum) and in handwriting: digits
{digits}. Fingerprint of the first 100 test questions: `{fingerprint(draw_test("test", 0, 100))[:16]}`.

## Recipe
From scratch, one run of `experiments/train_tiny_vlms/train.py {family}{f" --seed {seed}" if seed else ""}`: {settings}. AdamW, bf16 autocast, float32 master
weights, fresh pictures at every step; {training["seconds_per_step"]} s a step on one thread of a shared two-core machine.
Mix of question types: {mix}.
Validation headline by step (teacher-forced, bf16): {course}.
"""


def main() -> None:
    """Keep the log's summary, write the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=[*TITLES, *sorted(f.name for f in (SHIPPED / "trainings").iterdir())])
    parser.add_argument("--log", type=Path, help="log.jsonl of the training; without it the kept summary is used")
    arguments = parser.parse_args()
    if arguments.log:
        summary(arguments.model).write_text(json.dumps(summarise(arguments.log), indent=1) + "\n", encoding="utf-8")
    (folder_of(arguments.model) / "README.md").write_text(card(arguments.model), encoding="utf-8")


if __name__ == "__main__":
    main()
