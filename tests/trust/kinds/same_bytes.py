"""The same settings are run twenty times, each in a process and a folder of its own, twice under other seeds of Python's hashes,
and once behind another run in one process: all have the same bytes, their statistics too. With two threads the codebooks of the
same inputs are the same, and statistics agree to 1e-6 of their largest entry; so do those of samples that went through the model
two at a time."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from compared import CALIBRATED, PLAIN, QUICK, differing, number_equal, run_files, statistics_files
from forks import RUN, Forks, shared_forks
from safetensors.numpy import load_file
from trials import Outcome

TIMES = 20
WHOLE, SAMPLE = TIMES + 5, 0
CLOSE = 1e-6
KMEANS = (*QUICK, "method=kmeans", "codebook.sample=64")
ROWS = Path(__file__).parents[2] / "data" / "calibration" / "chat.jsonl"
CHATS = ("model=tiny_llava_onevision", *QUICK[1:], "method=gptq", "calibration=chat", f"calibration.path={ROWS}")
FIVE = ("calibration.num_samples=5", "calibration.heldout_samples=1")


def missing() -> str:
    return ""


def trials(scratch: Path, number: int) -> Iterator[Outcome]:
    forks = shared_forks()
    first = scratch / "first"
    for words in (PLAIN, CALIBRATED, KMEANS):
        if (ended := forks.run(words, first)).status:
            raise RuntimeError(ended.output)
    wanted = _all(first)
    for time in range(min(number, TIMES)):
        results = scratch / str(time)
        for words in (PLAIN, CALIBRATED, KMEANS):
            forks.run(words, results)
        yield _compared("run again in a process of its own", results, wanted)
    for seed in range(1, 3)[: max(0, number - TIMES)]:
        results = scratch / f"hash {seed}"
        for words in (PLAIN, CALIBRATED, KMEANS):
            environment = {**os.environ, "PYTHONHASHSEED": str(seed), "MGVQ_RESULTS": str(results)}
            subprocess.run([sys.executable, "-m", RUN, *words], env=environment, capture_output=True, check=True)
        yield _compared("run again with another seed of Python's hashes", results, wanted)
    if number > TIMES + 2:
        results = scratch / "behind"
        forks.run(("-m", *KMEANS, "seed=1,0"), results)
        forks.run(PLAIN, results)
        forks.run(CALIBRATED, results)
        own = {name.partition("/")[0] for name in wanted}
        found = {name: digest for name, digest in _all(results).items() if name.partition("/")[0] in own}
        yield _outcome("run behind another in one process", found, wanted)
    if number > TIMES + 3:
        yield _threads(forks, scratch, first)
    if number > TIMES + 4:
        yield _micro_batches(forks, scratch)


def _all(results: Path) -> dict[str, str]:
    return run_files(results) | statistics_files(results)


def _compared(case: str, results: Path, wanted: dict[str, str]) -> Outcome:
    return _outcome(case, _all(results), wanted)


def _outcome(case: str, found: dict[str, str], wanted: dict[str, str]) -> Outcome:
    return Outcome(case, compared=len(wanted), equal=number_equal(found, wanted), wrong=differing(found, wanted))


def _threads(forks: Forks, scratch: Path, first: Path) -> Outcome:
    """One thread against two: the run's name says which, so that its files are compared by what is in them."""
    results = scratch / "threads"
    for words in (CALIBRATED, KMEANS):
        if (ended := forks.run((*words, "threads=2"), results)).status:
            raise RuntimeError(ended.output)
    wrong = []
    one, two = (_tensors(folder) for folder in (first, results))
    same = [digest for digest in two if digest in one]
    if not same:
        wrong.append("k-means of the same weights gives other codebooks with two threads")
    wrong += _far_apart(first, results)
    return Outcome("run with two threads", compared=1, equal=int(bool(same)), wrong="; ".join(wrong))


def _micro_batches(forks: Forks, scratch: Path) -> Outcome:
    """Samples two at a time against eight: another size of the batches is another run, with statistics of its own."""
    two, eight = scratch / "two at a time", scratch / "eight at a time"
    for results, size in ((two, 2), (eight, 8)):
        if (ended := forks.run((*CHATS, *FIVE, f"calibration.batch_size={size}"), results)).status:
            raise RuntimeError(ended.output)
    return Outcome("samples two at a time", wrong="; ".join(_far_apart(two, eight)))


def _far_apart(results: Path, others: Path) -> list[str]:
    """By how much the statistics of the two differ, where that is more than sums in another order explain."""
    (kept,), (again,) = (sorted(folder.glob("cache/statistics/*.safetensors")) for folder in (results, others))
    statistics, compared = load_file(kept), load_file(again)
    distance = max(
        float(np.abs(compared[name] - value).max() / max(np.abs(value).max(), 1e-30)) for name, value in statistics.items()
    )
    print(f"same bytes: statistics are {distance:.1e} of their largest entry apart", flush=True)
    return [f"statistics are {distance:.1e} of their largest entry apart"] if distance > CLOSE else []


def _tensors(results: Path) -> set[str]:
    """The digests of the checkpoints of runs without statistics."""
    runs = [done.parent for done in results.glob("runs/*/DONE")]
    return {hashlib.sha256((run / "checkpoint/mgvq.safetensors").read_bytes()).hexdigest() for run in runs if _is_kmeans(run)}


def _is_kmeans(run: Path) -> bool:
    return '"calibration"' not in (run / "identity.json").read_text() and "kmeans" in (run / "identity.json").read_text()
