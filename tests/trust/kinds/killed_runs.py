"""A run that goes block by block is killed (`kill -9`) behind one of its blocks, in the statistics too where it is streamed, and
started again: it goes on from there, and its checkpoint, tables and answers have the same bytes as those of a run that was left
alone."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from forks import shared_forks
from trials import Outcome

WHOLE, SAMPLE = 40, 0  # `make test` stops the loop itself at every place: tests/e2e/test_gradient.py
SEED = 0
FEW = ["scope=language_projector", "evaluation.num_questions=8", "evaluation.answers=forced", "codebook.sample=64"]
METHODS = {
    "with a gradient": ["method=mgvq", "calibration.num_images=4", "calibration.heldout_images=2", "compensation.refresh=2"],
    "behind the quantised prefix": [
        "method=kmeans_ldlq", "prefix=quantized", "calibration.num_images=4", "calibration.heldout_images=2"
    ],
}  # fmt: skip
METHODS |= {f"{case}, streamed": [*method, "memory=streamed"] for case, method in METHODS.items()}
COMPARED = ("checkpoint/", "samples.parquet", "ledger.parquet", "layers.parquet", "blocks.parquet", "proxy.parquet")


def missing() -> str:
    return "" if hasattr(signal, "SIGKILL") else "this system has no SIGKILL."


def trials(scratch: Path, number: int) -> Iterator[Outcome]:
    """The methods in turn. A moment is behind a block that is drawn, and up to half a second later."""
    draws, wanted, lengths = np.random.default_rng(SEED), {}, {}
    for trial in range(number):
        case = list(METHODS)[trial % len(METHODS)]
        if case not in wanted:
            lengths[case] = finish(case, scratch / case)
            wanted[case] = files(scratch / case)
        results = scratch / str(trial)
        place, later = int(draws.integers(1, lengths[case] + 1)), float(draws.uniform(0, 0.5))
        killed = kill(case, results, place, later)
        finish(case, results)
        found = files(results)
        equal = sum(found.get(name) == digest for name, digest in wanted[case].items())
        differ = ", ".join(sorted(name for name, digest in wanted[case].items() if found.get(name) != digest))
        wrong = differ and f"seed {SEED}, trial {trial}: {differ} differ"
        survived = int(killed and not differ)
        yield Outcome(case, int(killed), survived, compared=len(wanted[case]), equal=equal, wrong=wrong)


def start(case: str, results: Path) -> subprocess.Popen[bytes]:
    """The command, in a process group of its own."""
    return subprocess.Popen(
        [str(shared_forks().python), "-m", "mgvq.cli.run", "model=tiny_internvl", *FEW, *METHODS[case]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "MGVQ_RESULTS": str(results)},
        start_new_session=True,
    )


def entries(results: Path, which: str = "*") -> int:
    """What a next start would go on behind: all, or those of such names."""
    try:
        return len(list((results / "partial").glob(f"*/{which}.entry")))
    except FileNotFoundError:  # the run has come to its end meanwhile, and has taken their folder away
        return 0


def blocks(results: Path) -> int:
    """The rounded blocks, and those whose statistics are there: of a streamed run each has a file of its own."""
    return len(list((results / "cache" / "statistics").glob("*/block-*.safetensors"))) + entries(results, "*block-*")


def finish(case: str, results: Path) -> int:
    """Run to the end; the most that `blocks` has counted. A failure raises with its output."""
    done = any(results.glob("runs/*/DONE"))  # of a run that was killed behind its last step
    process, most = start(case, results), 0
    while process.poll() is None:
        most = max(most, blocks(results))
        time.sleep(0.02)
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors.decode())
    if (left := entries(results)) or not (most or done):
        raise RuntimeError(f"{left} finished blocks are left, of {most} that were there")
    return most


def kill(case: str, results: Path, place: int, later: float) -> bool:
    """Kill the run `later` seconds after `blocks` has counted `place`; whether that was before its end."""
    process = start(case, results)
    while blocks(results) < place and process.poll() is None:
        time.sleep(0.02)
    try:
        process.communicate(timeout=later)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True
    return False


def files(results: Path) -> dict[str, str]:
    """SHA-256 of the run's files that hold neither seconds nor memory."""
    (done,) = results.glob("runs/*/DONE")
    return {name: sha for name, sha in json.loads(done.read_text(encoding="utf-8")).items() if name.startswith(COMPARED)}
