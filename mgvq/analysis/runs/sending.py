"""The record of a run for somebody else: packed with a card, and checked by whoever gets it.

Digests find what went wrong on the way. They are no signature: whoever writes a run anew writes new ones. So numbers are also
held against the answers that they are made of, and a run's name against its settings.
"""

import json
import math
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mgvq.analysis.records.records import read_parquet, read_record
from mgvq.analysis.runs.card import CARD, TO_FILL_IN, card, parts_of, write_card
from mgvq.analysis.runs.differences import provenance_of
from mgvq.analysis.runs.listed import ListedRun, read_run
from mgvq.analysis.statistics.measures import MEASURES
from mgvq.errors import UserError
from mgvq.runs.identity import id_of
from mgvq.runs.store import RunFolder
from mgvq.runs.tracking import MARK
from mgvq.studies.kinds import kind_of_metrics

_LEFT_OUT = "checkpoint/"  # too large to send; its digests stay in DONE
_MOST = 2 * 10**9  # bytes that an archive may unpack to
_NEEDED = ("config.yaml", "identity.json", "provenance.json", "metrics.json", "samples.parquet")
_CLOSE = 1e-6  # relative: sums in another order
_ROUNDED = 1e-3  # of a record, which keeps the losses of answers to three digits


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be, or that a reader should know."""

    kind: str
    """`MISSING`, `ALTERED` or `NOTE`; only the first two are faults."""
    text: str
    """What, and what mends it, in a sentence."""


def pack(run: ListedRun, folder: Path) -> Path:
    """Copy a run's files but its checkpoint into `folder/ID`, with a card beside them. Raises UserError for a damaged run.

    Packed again, what was written into the card by hand stays.
    """
    run.folder.verify()
    target = folder / run.id
    target.mkdir(parents=True, exist_ok=True)
    for name in [*_digests(run.folder.path), "DONE"]:
        if not name.startswith(_LEFT_OUT):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run.folder.path / name, target / name)
    shutil.copystat(run.folder.path / "DONE", target / "DONE")
    write_card(run, target)
    return target


def check_sent(path: Path) -> Iterator[Finding]:
    """What is missing or altered in a run's folder, an archive (.zip) of one, or the record of a study (.parquet).

    Raises UserError for a path that is none of these.
    """
    if path.is_dir():
        yield from _check_run(path)
    elif path.suffix == ".parquet" and path.is_file():
        yield from _check_record(path)
    elif path.is_file() and zipfile.is_zipfile(path):
        with tempfile.TemporaryDirectory(prefix="mgvq-") as place:
            yield from _check_run(_unpacked(path, Path(place) / path.stem))
    else:
        raise UserError(f"{path} is no folder, no .zip and no .parquet of a record: give what was packed by mgvq-runs pack.")


def _unpacked(file: Path, place: Path) -> Path:
    """The folder of the run in an archive. zipfile writes nothing outside of `place`, whatever names the archive has."""
    with zipfile.ZipFile(file) as archive:
        size = sum(member.file_size for member in archive.infolist())
        if size > _MOST:
            raise UserError(f"{file} would unpack to {size / 1e9:.1f} GB; a run without its checkpoint is far smaller.")
        try:
            archive.extractall(place)
        except (zipfile.BadZipFile, RuntimeError, OSError) as error:
            raise UserError(f"{file} cannot be unpacked: {error}; have it sent again.") from error
    runs = [done.parent for done in sorted(place.rglob("DONE"))]
    if len(runs) != 1:
        raise UserError(f"{file} holds {len(runs)} files DONE, where one run has one: pack a single folder.")
    return runs[0]


def _digests(run: Path) -> dict[str, str]:
    return json.loads((run / "DONE").read_bytes())


def _check_run(path: Path) -> Iterator[Finding]:
    folder = RunFolder(path)
    if not folder.is_done():
        raise UserError(f"{path} has no DONE: it is no finished run, or lost the file on the way.")
    try:
        digests = _digests(path)
        names = [*digests]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}/DONE holds no digests of the run's files: have it sent again.") from error
    broken = set()
    for name in names:
        if not (path / name).is_file():
            if not name.startswith(_LEFT_OUT):
                broken.add(name)
                yield Finding("MISSING", f"{name}: the run wrote it, and it is not here.")
            continue
        try:
            folder.verify(name)
        except UserError:
            broken.add(name)
            yield Finding("ALTERED", f"{name} is not the file that the run wrote.")
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        if (name := str(file.relative_to(path))) not in (*names, "DONE", CARD, MARK):
            yield Finding("ALTERED", f"{name} was not written by the run: take it out.")
    for name in _NEEDED:
        if name not in names:
            broken.add(name)
            yield Finding("MISSING", f"{name}: DONE does not name it, and every run has one.")
    if not any((path / name).is_file() for name in names if name.startswith(_LEFT_OUT)):
        yield Finding("NOTE", "the checkpoint is not here: what it holds can be told by its digests in DONE alone.")
    if broken & set(_NEEDED):
        return
    run = read_run(path)
    yield from _check_name(run)
    yield from _check_numbers(run)
    yield from _check_provenance(provenance_of(path))
    yield from _check_card(run)


def _check_name(run: ListedRun) -> Iterator[Finding]:
    if (name := id_of(run.settings)) != run.id:
        yield Finding("ALTERED", f"the settings in identity.json are those of run {name}, and the folder is called {run.id}.")


def _check_numbers(run: ListedRun) -> Iterator[Finding]:
    """Metrics against the answers that they are made of."""
    try:
        kind = kind_of_metrics(run.metrics)
    except UserError:
        yield Finding("NOTE", "conf/ does not have this evaluation, so that metrics are not held against the answers.")
        return
    samples = read_parquet(run.folder.path / "samples.parquet", "have it sent again.")
    made: dict[str, float] = {}
    for name in kind.measures:
        measure = MEASURES[name]
        column = samples.score if name == "accuracy" else samples.loss
        metric = kind.headline if name == "accuracy" else "loss/answer"
        made[metric] = float(column.to_numpy(float) @ measure.weigh(samples, kind))
    if "kl" in samples:
        made["kl/full_precision"] = float(samples.kl.sum(skipna=False) / samples.num_tokens.sum())
    if kind.headline == "text/perplexity":
        made[kind.headline] = math.exp(min(made["loss/answer"], 700.0))
    yield from _held_against(made, run.metrics, "metrics.json", _CLOSE)


def _held_against(made: dict[str, float], metrics: Any, where: str, tolerance: float) -> Iterator[Finding]:
    for name, value in made.items():
        told = metrics.get(name)
        if told is None and not math.isfinite(value):
            continue
        if told is None or not np.isclose(told, value, rtol=tolerance, atol=tolerance):
            yield Finding("ALTERED", f"{name} is {told} in {where}, and the answers make {value:.6g} of it.")


def _check_provenance(origin: dict[str, Any]) -> Iterator[Finding]:
    for name, why in {"version": "of mgvq", "python": "of Python", "machine.platform": "of the machine"}.items():
        if not origin.get(name):
            yield Finding("MISSING", f"provenance.json has no {name} {why}.")
    if not origin.get("model.path"):
        yield Finding("MISSING", "provenance.json does not say where the model is from (model.path).")
    if not origin.get("commit"):
        yield Finding("NOTE", "no commit: mgvq was not run in a git checkout, so that its version alone says which code it was.")
    if origin.get("dirty"):
        yield Finding("NOTE", "the code had changes that were not committed: nobody else has it, so run it again from a commit.")


def _check_card(run: ListedRun) -> Iterator[Finding]:
    file = run.folder.path / CARD
    if not file.is_file():
        yield Finding("MISSING", f"{CARD}: mgvq-runs pack writes it.")
        return
    made, own = parts_of(file.read_text(encoding="utf-8"))
    if made != card(run):
        yield Finding("ALTERED", f"{CARD} does not say what the files say: mgvq-runs pack writes that part anew.")
    if not own.strip() or TO_FILL_IN in own.split():
        yield Finding("MISSING", f"{CARD} has answers to fill in, where it says {TO_FILL_IN}.")


def _check_record(path: Path) -> Iterator[Finding]:
    """Names against settings and metrics against answers, of every run of a study's record."""
    record = read_record(path)
    for cell in record.cells:
        for run in cell.runs:
            where = f"run {run.run} (arm {cell.arm}, {cell.point.words})"
            if (name := id_of(json.loads(run.identity))) != run.run:
                yield Finding("ALTERED", f"{where}: its settings are those of run {name}.")
            made = {}
            for name in record.kind.measures:
                measure = MEASURES[name]
                metric = record.kind.headline if name == "accuracy" else "loss/answer"
                values = getattr(run, measure.column)
                made[metric] = float(np.asarray(values, float) @ measure.weigh(record.questions, record.kind))
            yield from _held_against(made, run.metrics, where, _ROUNDED)
    yield Finding("NOTE", "a record has no provenance: pack the runs that it is made of, by mgvq-runs pack, beside it.")
