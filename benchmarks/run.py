"""`make bench`: what costs time, as ratios against a reference measured in the same run.

Each pair is timed alternately, several times, on one thread (the kernels on two); the table shows the median of each and their
ratio. Written to results/tables/benchmarks.md; `--only SUBSTRING` measures the rows that have it in their name, and prints them
alone.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import codebook
import codes
import compensation
import curvature
import kernels
import stages
import torch

from mgvq.evaluation.documents import documents
from mgvq.evaluation.forced import score
from mgvq.evaluation.harness import evaluate
from mgvq.evaluation.tasks.tiny_vqa import TinyVQATask
from mgvq.model.encode import Example, batches
from mgvq.model.load import load
from mgvq.model.source import SHIPPED, Source
from mgvq.runs.places import results_folder

ROUNDS = 5


def pairs() -> dict[str, tuple[Callable[[], object], str, Callable[[], object]]]:
    """Name -> (what is measured, what it is held against, that)."""
    source = Source(name="tiny_internvl", path=str(SHIPPED / "tiny_internvl"), revision=None, dtype="float32")
    loaded = load(source, torch.device("cpu"))
    docs = documents(0, 104)
    examples = [Example(d["sample_id"], d["image"], d["question"], d["answer"]) for d in docs]

    def forced() -> object:
        return score(loaded.model, None, batches(loaded.processor, examples, 104))

    return {
        **codebook.pairs(),
        **codes.pairs(),
        **compensation.pairs(),
        **curvature.pairs(),
        **kernels.pairs(),
        **stages.pairs(),
        "104 answers generated through lmms-eval": (
            lambda: evaluate(loaded.model, loaded.processor, TinyVQATask(docs), "benchmark", 104),
            "104 answers teacher-forced",
            forced,
        ),
    }


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="SUBSTRING", default="", help="rows with this in their name; nothing is written")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    lines = ["| measured | ms | reference | ms | ratio |", "|---|---|---|---|---|"]
    for name, (work, against, reference) in pairs().items():
        if only not in name:
            continue
        seconds(work), seconds(reference)  # warm
        times = [(seconds(work), seconds(reference)) for _ in range(ROUNDS)]
        ours, theirs = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        lines.append(f"| {name} | {ours:.1f} | {against} | {theirs:.1f} | {ours / theirs:.2f} |")
        print(lines[-1], flush=True)
    if not only:
        path = results_folder() / "tables" / "benchmarks.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
