"""Every file of a finished run, of its statistics and of a record is cut to half its length, and emptied, and a run, a checkpoint
and statistics of another version are put in their place: whoever reads them says which file it is and what to do, and what is
run again has the same bytes."""

import json
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

from compared import CALIBRATED, differing, litter, number_equal, run_files, statistics_files
from forks import Forks, shared_forks
from trials import Outcome

from mgvq.analysis.records.records import read_record
from mgvq.checkpoint.digests import write_digests
from mgvq.checkpoint.index import VERSION
from mgvq.checkpoint.load import load
from mgvq.errors import UserError
from mgvq.model.files import INDEX
from mgvq.runs.store import RunFolder
from mgvq.runs.verify import verify

ROOT = Path(__file__).parents[3]
HELP = (
    "run its settings again",
    "run it again",
    "makes it again",
    "check out",
    "make it anew",
    "mgvq-report",
    "another version",
)
UNREAD = ("README.md", "LICENSE")  # of a checkpoint: no loader looks at these
WHOLE, SAMPLE = 6, 0


def missing() -> str:
    return ""


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def trials(scratch: Path, number: int) -> Iterator[Outcome]:
    forks = shared_forks()
    whole = scratch / "whole"
    if (ended := forks.run(CALIBRATED, whole)).status:
        raise RuntimeError(ended.output)
    damages: list[Callable[[Path], None]] = [half, empty]
    cases = [
        *(lambda damage=damage: _run_files(scratch, whole, damage) for damage in damages),
        lambda: _records(scratch),
        *(lambda damage=damage: _statistics(forks, scratch / damage.__name__, whole, damage) for damage in damages),
        lambda: _other_versions(forks, scratch / "other", whole),
    ]
    yield from (case() for case in cases[:number])


def _run_files(scratch: Path, whole: Path, damage: Callable[[Path], None]) -> Outcome:
    """File by file; the checkpoint's are also loaded."""
    (run,) = (done.parent for done in whole.glob("runs/*/DONE"))
    names = [*json.loads((run / "DONE").read_text()), "DONE"]
    faults = lost = silent = 0
    for name in names:
        copy = scratch / "copy"
        shutil.copytree(run, copy / "runs" / run.name)
        damaged = copy / "runs" / run.name / name
        if damaged.stat().st_size:
            faults += 1
            damage(damaged)
            told = [found.fault for found in verify([copy]) if found.fault]
            lost += int(not told)
            silent += int(not any(str(damaged) in fault and any(word in fault for word in HELP) for fault in told))
            if name.startswith("checkpoint/") and not name.endswith(UNREAD):
                lost += int(_raised(lambda: load(copy / "runs" / run.name / "checkpoint")) is None)  # noqa: B023 (called here)
        shutil.rmtree(copy)
    survived = faults - min(faults, lost + silent)
    return Outcome(f"a file of a run {_words(damage)}", faults, survived, lost, silent)


def _records(scratch: Path) -> Outcome:
    """The committed records."""
    faults = lost = 0
    for record in sorted((ROOT / "results" / "records").glob("*.parquet")):
        if record.stem.endswith("_layers"):
            continue
        for damage in (half, empty):
            copy = scratch / record.name
            shutil.copyfile(record, copy)
            damage(copy)
            faults += 1
            lost += int(str(copy) not in (_raised(lambda: read_record(copy)) or ""))  # noqa: B023 (called here)
    return Outcome("a record cut to half, or emptied", faults, faults - lost, lost)


def _statistics(forks: Forks, results: Path, whole: Path, damage: Callable[[Path], None]) -> Outcome:
    """The run is gone, and the statistics that it would take again are damaged."""
    wanted = run_files(whole) | statistics_files(whole)
    faults = survived = lost = silent = equal = 0
    wrong = []
    for suffix in (".safetensors", ".sha256"):
        shutil.copytree(whole, results)
        shutil.rmtree(results / "runs")
        (file,) = results.glob(f"cache/statistics/*{suffix}")
        damage(file)
        ended = forks.run(CALIBRATED, results)
        aside = [left for left in litter(results) if left.endswith(".bad")]
        found = run_files(results) | statistics_files(results)
        silent += int("collected again" not in ended.output)
        lost += int(not aside)
        text = differing(found, wanted) or (f"ended with {ended.status}" if ended.status else "")
        wrong += [text] if text else []
        faults, survived, equal = faults + 1, survived + int(not text), equal + number_equal(found, wanted)
        shutil.rmtree(results)
    case = f"statistics or their digest {_words(damage)}"
    return Outcome(case, faults, survived - lost - silent, lost, silent, 2 * len(wanted), equal, "; ".join(wrong))


def _other_versions(forks: Forks, results: Path, whole: Path) -> Outcome:
    """With digests that fit: they are what another version has written."""
    shutil.copytree(whole, results)
    (run,) = (done.parent for done in results.glob("runs/*/DONE"))
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"schema_version": metrics["schema_version"] + 1}))
    index = run / "checkpoint" / INDEX
    content = index.read_bytes()
    index.write_bytes(content[:4] + (VERSION + 1).to_bytes(4, "little") + content[8:])
    write_digests(run / "checkpoint")
    names = json.loads((run / "DONE").read_text())
    (run / "DONE").write_text(json.dumps({name: sha256((run / name).read_bytes()).hexdigest() for name in names}))
    told = [_raised(RunFolder(run).metrics), _raised(lambda: load(run / "checkpoint"))]
    ended = forks.run(CALIBRATED, results)
    told.append(ended.output if ended.status else None)
    lost = told.count(None)
    silent = sum(text is not None and "version" not in text for text in told)
    shutil.rmtree(run)
    wrong = [] if not forks.run(CALIBRATED, results).status else ["it does not run again"]
    found, wanted = run_files(results), run_files(whole)
    wrong += [text] if (text := differing(found, wanted)) else []
    survived = 3 - lost - silent if not wrong else 0
    case = "a run and a checkpoint of another version"
    return Outcome(case, 3, survived, lost, silent, len(wanted), number_equal(found, wanted), "; ".join(wrong))


def _raised(function: Callable[[], object]) -> str | None:
    """The words of the UserError; None where there was none."""
    try:
        function()
    except UserError as error:
        return str(error)
    return None


def _words(damage: Callable[[Path], None]) -> str:
    return "cut to half" if damage is half else "emptied"
