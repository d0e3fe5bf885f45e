"""`make trust`: what takes too long for `make test`. Tries every kind at full length, and writes results/tables/trust.md.

    python tests/trust/trust.py [--only KIND ...] [--share .1]
    python tests/trust/trust.py --table

Every kind has a record of its own, results/records/trust/KIND.json, with the commit, the day and the cores that it was tried on,
and the table is drawn from all of them after every trial: kinds can be tried one at a time, on several days and machines. With
`--share` less is tried, and the table is printed alone; `--table` tries nothing and draws the table anew. The exit status is 1
where something does not hold.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from trials import Outcome, holds, kinds, summary, table

from mgvq.runs.places import results_folder
from mgvq.runs.provenance import provenance

RECORDS = "records/trust"
NEVER = {"commit": "none", "date": "", "cores": 0}


def tried(
    name: str, kind: ModuleType, share: float, keep: Callable[[dict[str, Any]], None] = lambda record: None
) -> dict[str, Any]:
    """The record of one kind. A trial that raises ends the kind and stands in the record as one that does not hold.

    `keep` is given the record after every trial, so that one that is stopped tells how far it came.
    """
    if reason := kind.missing():
        return summary(kind, [], 0.0, reason)
    number = math.ceil(share * kind.WHOLE)
    outcomes: list[Outcome] = []
    since = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for outcome in kind.trials(Path(scratch), number):
                outcomes.append(outcome)
                state = "holds" if outcome.holds else f"DOES NOT HOLD: {outcome}"
                print(f"{name}, {len(outcomes)}, {outcome.case}: {outcome.not_run or state}", flush=True)
                stopped = f"stopped after trial {len(outcomes)} of {number}."
                keep(summary(kind, outcomes, time.monotonic() - since, stopped))
        except Exception as error:
            traceback.print_exc()
            outcomes.append(Outcome("a trial that did not end", wrong=f"{type(error).__name__}: {str(error)[:300]}"))
    return summary(kind, outcomes, time.monotonic() - since)


def write(name: str, record: Mapping[str, Any], results: Path) -> None:
    """Write the record of one kind, and the table of all."""
    file = record_file(name, results)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(results)


def draw(results: Path) -> None:
    """Write the table of what was found of all kinds."""
    (results / "tables").mkdir(parents=True, exist_ok=True)
    (results / "tables" / "trust.md").write_text(table(found(results)), encoding="utf-8")


def found(results: Path) -> dict[str, Any]:
    """The records of all kinds; of one that was never tried, that it was not."""
    records = {}
    for name, kind in kinds().items():
        file = record_file(name, results)
        nothing = summary(kind, [], 0.0, "not tried yet.") | NEVER
        records[name] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else nothing
    return {"kinds": records}


def record_file(name: str, results: Path) -> Path:
    return results / RECORDS / f"{name.replace(' ', '_')}.json"


def here() -> dict[str, Any]:
    """The commit, with what differs from it outside of the results, the day and the cores."""
    root = Path(__file__).parents[2]
    command = ["git", "-C", str(root), "status", "--porcelain", "--", ".", ":!results"]
    changed = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    commit = (provenance()["commit"] or "unknown")[:7]
    day = datetime.now(UTC).date().isoformat()
    return {"commit": f"{commit} with changes" if changed else commit, "date": day, "cores": os.cpu_count()}


def main() -> int:
    """Try, print, write."""
    names = list(kinds())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    only = {"nargs": "+", "metavar": "KIND", "choices": names, "type": lambda name: name.replace("_", " ")}
    parser.add_argument("--only", **only, default=names, help=f"these alone, of {', '.join(names).replace(' ', '_')}")
    parser.add_argument("--share", type=float, default=1.0, help="of the trials of each kind (default: 1)")
    parser.add_argument("--table", action="store_true", help="try nothing, draw the table")
    arguments = parser.parse_args()
    results, where, tries = results_folder(), here(), {}

    def keep(name: str, record: dict[str, Any]) -> None:
        tries[name] = record | where
        if arguments.share == 1:
            write(name, tries[name], results)

    if arguments.table:
        draw(results)
        return 0
    for name in arguments.only:
        keep(name, tried(name, kinds()[name], arguments.share, partial(keep, name)))
    print(table({"kinds": tries}))
    return 0 if holds({"kinds": tries}) else 1


if __name__ == "__main__":
    sys.exit(main())
