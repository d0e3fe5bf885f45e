"""Every process of a run and of the demo is watched: nobody asks for an address or connects to one, nothing is unpickled but by
numba, whose compiled loops lie in the user's own cache, and every file of the results is of a kind that holds no code. The demo
has no network at all where one can be taken away."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from compared import CALIBRATED
from trials import Outcome

ROOT = Path(__file__).parents[3]
SHIMS = Path(__file__).parents[1] / "shims"
DEMO = ROOT / "experiments" / "e00_demo" / "study.yaml"
KINDS = {".index", ".json", ".md", ".yaml", ".parquet", ".safetensors", ".sha256", ".jinja", ".txt", ".log"}
MARKS = {"DONE", "TRACKED"}
WHOLE, SAMPLE = 2, 0


def missing() -> str:
    return ""


def trials(scratch: Path, number: int) -> Iterator[Outcome]:
    yield _watched(scratch / "run", "one run", ("mgvq.cli.run", *CALIBRATED), ())
    if number > 1:
        alone = ("unshare", "--net") if _can_be_alone() else ()
        case = f"the demo{', without a network' if alone else ''}"
        yield _watched(scratch / "demo", case, ("mgvq.cli.study", str(DEMO), "--jobs", "2"), alone)
        if not alone:
            yield Outcome("the demo, without a network", not_run="a network is taken away with the rights of root.")


def _can_be_alone() -> bool:
    command = ["unshare", "--net", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


def _watched(results: Path, case: str, command: Sequence[str], alone: Sequence[str]) -> Outcome:
    results.mkdir()
    notes = results.parent / f"{results.name}.notes"
    notes.touch()
    environment = {
        **os.environ,
        "MGVQ_RESULTS": str(results),
        "MGVQ_AUDIT": str(notes),
        "PYTHONPATH": os.pathsep.join([str(SHIMS), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    done = subprocess.run([*alone, sys.executable, "-m", *command], env=environment, capture_output=True, text=True)
    wrong = [f"ended with {done.returncode}: {done.stderr[-600:]}"] if done.returncode else []
    heard = sorted({line for line in notes.read_text().splitlines() if not _is_numba(line)})
    wrong += [f"heard: {'; '.join(heard[:5])}"] if heard else []
    files = [file for file in results.rglob("*") if file.is_file() and not {".locks"} & set(file.parts)]
    other = [str(file.relative_to(results)) for file in files if file.suffix not in KINDS and file.name not in MARKS]
    wrong += [f"files of other kinds: {', '.join(other[:5])}"] if other or not files else []
    return Outcome(case, wrong="; ".join(wrong))


def _is_numba(line: str) -> bool:
    """Whether numba, or what it calls, has unpickled."""
    return line.startswith("pickle.find_class") and "/site-packages/numba/" in line
