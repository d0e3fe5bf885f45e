"""`make bench`: what costs time, as ratios against a reference measured in the same run.

Each pair is timed alternately, several times, on one thread; the table shows the median of each and their ratio. Written to
results/tables/benchmarks.md.
"""

import statistics
import time
from collections.abc import Callable

import torch

from mgvq.codebook.lloyd import kmeans, nearest
from mgvq.evaluation.forced import score
from mgvq.evaluation.harness import evaluate
from mgvq.evaluation.tasks.tiny_vqa import TinyVQATask, documents
from mgvq.formats.packing import pack, unpack
from mgvq.model.encode import Example, batches
from mgvq.model.load import load
from mgvq.model.source import SHIPPED, Source
from mgvq.rng import generator
from mgvq.runs.places import results_folder

ROUNDS = 5


def pairs() -> dict[str, tuple[Callable[[], object], str, Callable[[], object]]]:
    """Name -> (what is measured, what it is held against, that)."""
    draws = generator(0, "benchmark")
    matrix = torch.randn(1024, 1024, generator=draws)
    vectors = torch.randn(65536, 4, generator=draws)
    table = torch.randn(256, 4, generator=draws)
    codes = torch.randint(16, (1 << 20,), generator=draws)
    packed = pack(codes, 4)
    source = Source(name="tiny_internvl", path=str(SHIPPED / "tiny_internvl"), revision=None, dtype="float32")
    loaded = load(source, torch.device("cpu"))
    docs = documents(0, 104)
    examples = [Example(d["sample_id"], d["image"], d["question"], d["answer"]) for d in docs]

    def product() -> object:
        return matrix @ matrix

    def cdist() -> object:
        return torch.cdist(vectors, table).argmin(1)

    def forced() -> object:
        return score(loaded.model, None, batches(loaded.processor, examples, 104))

    return {
        "nearest of 256 centroids, 65,536 x 4": (lambda: nearest(vectors, table), "torch.cdist + argmin", cdist),
        "k-means, 256 centroids, 65,536 x 4, 25 iterations": (
            lambda: kmeans(vectors, 256, generator(0, "k")),
            "25 x (torch.cdist + argmin)",
            lambda: [cdist() for _ in range(25)],
        ),
        "pack 1 Mi codes of 4 bits": (lambda: pack(codes, 4), "1024^3 matrix product", product),
        "unpack 1 Mi codes of 4 bits": (lambda: unpack(packed, 4, len(codes)), "1024^3 matrix product", product),
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
    torch.set_num_threads(1)
    lines = ["| measured | ms | reference | ms | ratio |", "|---|---|---|---|---|"]
    for name, (work, against, reference) in pairs().items():
        seconds(work), seconds(reference)  # warm
        times = [(seconds(work), seconds(reference)) for _ in range(ROUNDS)]
        ours, theirs = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        lines.append(f"| {name} | {ours:.1f} | {against} | {theirs:.1f} | {ours / theirs:.2f} |")
        print(lines[-1], flush=True)
    path = results_folder() / "tables" / "benchmarks.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
