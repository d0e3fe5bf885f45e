"""A run is ended in each of its stages by `kill -9`, Ctrl-C and SIGTERM: what was finished before is as it was, what was begun is
believed by nobody, Ctrl-C and SIGTERM end it with the words that help, and the same command then gives the same bytes and
leaves nothing lying about."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from compared import CALIBRATED, PLAIN, differing, faults_of, litter, number_equal, run_files, statistics_files
from forks import Forks, shared_forks
from trials import Outcome

# Each stage by the function in which the run is ended, and whether before or after it has done its work.
STAGES: dict[str, tuple[str, str, int]] = {
    "settings are checked": ("mgvq.runs.execute:build_method", "before", 1),
    "the model is loaded": ("mgvq.runs.execute:load", "after", 1),
    "statistics are collected": ("mgvq.runs.quantise:collect", "before", 1),
    "statistics are written": ("mgvq.runs.cache:seal", "after", 1),
    "layers are rounded": ("mgvq.compensation.hessian:Hessian.round", "after", 3),
    "a table is written": ("pandas:DataFrame.to_parquet", "after", 2),
    "the checkpoint is saved": ("mgvq.checkpoint.files:save_file", "after", 1),
    "questions are answered": ("mgvq.evaluation.tiny_vqa:metrics", "before", 1),
    "the run is sealed": ("mgvq.runs.store:_sync_names", "before", 1),
    "DONE is written": ("mgvq.runs.store:RunFolder._write", "after", 6),
}
SIGNALS = ("SIGKILL", "SIGINT", "SIGTERM")
STATUS = {"SIGKILL": -signal.SIGKILL, "SIGINT": 130, "SIGTERM": -signal.SIGTERM}
WORDS = {"SIGKILL": "kill -9", "SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM"}
HELP = "the same command starts it again"
WHOLE, SAMPLE = len(STAGES) * len(SIGNALS), 1


def missing() -> str:
    return "" if hasattr(signal, "SIGKILL") else "this system has no SIGKILL."


def trials(scratch: Path, number: int) -> Iterator[Outcome]:
    """The first ones are all stages, with the signals in turn."""
    forks = shared_forks()
    before, wanted = scratch / "before", scratch / "undisturbed"
    for words, results in ((PLAIN, before), (PLAIN, wanted), (CALIBRATED, wanted)):
        if (ended := forks.run(words, results)).status:
            raise RuntimeError(ended.output)
    cases = [(stage, SIGNALS[(at + turn) % 3]) for turn in range(3) for at, stage in enumerate(STAGES)]
    for stage, name in cases[:number]:
        results = scratch / "results"
        shutil.copytree(before, results)
        yield _trial(forks, results, stage, name, run_files(before), wanted)
        shutil.rmtree(results)


def _trial(forks: Forks, results: Path, stage: str, name: str, finished: dict[str, str], undisturbed: Path) -> Outcome:
    wanted, statistics = run_files(undisturbed), statistics_files(undisturbed)
    at, when, call = STAGES[stage]
    ended = forks.run(CALIBRATED, results, {"at": at, "when": when, "call": call, "do": name})
    wrong = []
    if ended.status != STATUS[name]:
        wrong.append(f"ended with {ended.status}: {ended.output[-300:]}")
    found = run_files(results)
    done = stage == "DONE is written"
    lost = len(faults_of(results)) + sum(found.get(name) != digest for name, digest in finished.items())
    lost += int((len(found) > len(finished)) != done)  # a run that is not done is believed, or one that is done is gone
    silent = int(name != "SIGKILL" and HELP not in ended.output)
    again = forks.run(CALIBRATED, results)
    if again.status:
        wrong.append(f"the same command ends with {again.status}: {again.output[-300:]}")
    found = {**run_files(results), **statistics_files(results)}
    wanted = {**wanted, **statistics}
    wrong += [differing(found, wanted)] + [f"left lying: {', '.join(left)}" for left in [litter(results)] if left]
    told = "; ".join(filter(None, wrong))
    survived = int(not told and not lost and not silent)
    case = f"{WORDS[name]} while {stage}"
    return Outcome(case, 1, survived, lost, silent, len(wanted), number_equal(found, wanted), told and f"{case}: {told}")
