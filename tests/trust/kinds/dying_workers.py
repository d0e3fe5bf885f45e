"""A worker of joblib, of Ray and the process of W&B are killed while a run goes on; two processes want one run, and two runs want
the same statistics at once. What was finished stays, somebody says what to do, and the same command gives the same bytes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from compared import CALIBRATED, PLAIN, differing, faults_of, litter, number_equal, run_files, statistics_files
from faults import VARIABLE
from forks import RUN, Ended, Forks, shared_forks
from trials import Outcome

SHIMS = Path(__file__).parents[1] / "shims"
TWO = (*PLAIN, "budget.bits_per_weight=2,3")
STUDY = f"""
name: workers
question: is it the same after a worker has died?
common: [{", ".join(PLAIN)}]
arms: {{two bits: [budget.bits_per_weight=2], three bits: [budget.bits_per_weight=3]}}
seeds: [0]
"""
IN_A_RUN = {"at": "mgvq.runs.execute:save", "when": "after", "call": 1, "do": "SIGKILL"}
IN_A_WORKER = {"at": "mgvq.studies.launchers.job:Command.popen", "when": "after", "call": 1, "do": "SIGKILL"}
IN_WANDB = {"at": "mgvq.tracker.wandb:_figures", "when": "before", "call": 1, "do": "KILL CHILDREN"}
WHOLE, SAMPLE = 5, 0


def missing() -> str:
    return ""


def trials(scratch: Path, number: int) -> Iterator[Outcome]:
    forks = shared_forks()
    undisturbed = scratch / "undisturbed"
    for words in (*((*PLAIN, f"budget.bits_per_weight={bits}") for bits in (2, 3)), CALIBRATED):
        if (ended := forks.run(words, undisturbed)).status:
            raise RuntimeError(ended.output)
    (study := scratch / "study.yaml").write_text(STUDY)
    wanted = run_files(undisturbed)
    plain = {name: digest for name, digest in wanted.items() if name.partition("/")[0] != _calibrated(undisturbed)}
    whole = {n: d for n, d in wanted.items() if n not in plain} | statistics_files(undisturbed)
    cases = (
        lambda: _both(forks, scratch / "two", "two processes want one run", [CALIBRATED, CALIBRATED], whole),
        lambda: _both(forks, scratch / "shared", "two runs want the same statistics", [CALIBRATED, OTHER], None),
        lambda: _killed(scratch / "wandb", "W&B's process", (RUN, *CALIBRATED, "tracker=wandb"), IN_WANDB, whole, (0,)),
        lambda: _killed(
            scratch / "joblib", "a worker of joblib", (RUN, "-m", "hydra/launcher=mgvq_joblib", *TWO), IN_A_RUN, plain, (1,)
        ),
        lambda: _killed(
            scratch / "ray",
            "a worker of Ray",
            ("mgvq.cli.study", str(study), "--launcher", "ray", "--jobs", "2"),
            IN_A_WORKER,
            plain,
            (1,),
        ),
    )
    yield from (trial() for trial in cases[:number])


OTHER = (*CALIBRATED, "budget.bits_per_weight=3")
WORDS = {"W&B's process": "The run is complete", "a worker of joblib": "same command", "a worker of Ray": "the same command"}
PACKAGES = {"W&B's process": "wandb", "a worker of joblib": "joblib", "a worker of Ray": "ray"}


def _calibrated(results: Path) -> str:
    (name,) = {
        identity.parent.name
        for identity in results.glob("runs/*/identity.json")
        if "calibration" in json.loads(identity.read_text())
    }
    return name


def _both(forks: Forks, results: Path, case: str, commands: list[tuple[str, ...]], wanted: dict[str, str] | None) -> Outcome:
    """Started at the same time; without `wanted`, compared with the same after each other."""
    if wanted is None:
        for words in commands:
            forks.run(words, results / "alone")
        wanted = run_files(results / "alone") | statistics_files(results / "alone")
    results = results / "together"
    ends = [forks.wait(pid) for pid in [forks.start(words, results) for words in commands]]
    wrong = [f"ended with {end.status}: {end.output[-300:]}" for end in ends if end.status]
    return _judged(case, results, wanted, wrong, lost=len(faults_of(results)), silent=0)


def _killed(
    results: Path, who: str, command: tuple[str, ...], fault: dict, wanted: dict[str, str], statuses: tuple[int, ...]
) -> Outcome:
    """In processes of their own, all of which know of the fault; the first that gets there is hit."""
    case = f"{who} is killed"
    if find_spec(PACKAGES[who]) is None:
        return Outcome(case, not_run=f"{PACKAGES[who]} is not installed.")
    results.mkdir()
    ended = _start(results, command, fault | {"once": str(results.parent / f"{results.name} was hit")})
    wrong = [] if (results.parent / f"{results.name} was hit").exists() else ["nobody was hit"]
    if ended.status not in statuses:
        wrong.append(f"ended with {ended.status}: {ended.output[-600:]}")
    lost = len(faults_of(results)) + sum(wanted.get(name) != digest for name, digest in run_files(results).items())
    silent = int(WORDS[who] not in ended.output)
    again = _start(results, command, None)
    if again.status:
        wrong.append(f"the same command ends with {again.status}: {again.output[-600:]}")
    return _judged(case, results, wanted, wrong, lost, silent, ended.output)


def _judged(
    case: str, results: Path, wanted: dict[str, str], wrong: list[str], lost: int, silent: int, output: str = ""
) -> Outcome:
    found = run_files(results) | statistics_files(results)
    wrong += [differing(found, wanted)] + [f"left lying: {', '.join(left)}" for left in [litter(results)] if left]
    wrong += [f"silent: {output[-600:]}"] if silent else []
    text = "; ".join(filter(None, wrong))
    survived = int(not text and not lost and not silent)
    return Outcome(case, 1, survived, lost, silent, len(wanted), number_equal(found, wanted), text and f"{case}: {text}")


def _start(results: Path, command: tuple[str, ...], fault: dict | None) -> Ended:
    paths = [str(SHIMS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "MGVQ_RESULTS": str(results),
        "PYTHONPATH": os.pathsep.join(paths),
        "RAY_worker_niceness": "0",
        "WANDB_MODE": "offline",
        "WANDB_DATA_DIR": str(results.parent / "wandb_data"),
        "WANDB_CACHE_DIR": str(results.parent / "wandb_cache"),
        "WANDB_CONFIG_DIR": str(results.parent / "wandb_config"),
        **({VARIABLE: json.dumps(fault)} if fault else {}),
    }
    done = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True, errors="replace")
    return Ended(done.returncode, done.stdout + done.stderr)
